"""`RayExecutor`: groups of devices on the nodes of a Ray cluster (`devices.executor=ray`).

An actor for each group holds its GPUs, or its cores, as resources of its node. It starts the worker process that a
group of this machine has too (compute/worker.py), with the same threads and environment, and passes its events on. So
the shards are made by the same code in the same kind of process, and are the same. The stage's process only dispatches.

    on a GPU cluster     generate.vllm.tensor_parallel_size GPUs (else one) are a group
    on a CPU cluster     devices.cpu_processes groups share the cores that Ray has for the node

A node that joins gets work once it has proved that it sees the run folder (compute/ray_cluster.py). When a node is
lost, Ray ends its actors, and their workers end with them: the shards that they held go to others. When the stage's
process ends, however it ends, so do its actors.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dice_py.compute.devices import Group, cuda_unstarted
from dice_py.compute.executor import GroupProcess
from dice_py.compute.failures import Failure, failure_fields
from dice_py.compute.log_tail import log_tail
from dice_py.compute.ray_actor import GroupActor
from dice_py.compute.ray_cluster import (
    PROVING,
    Node,
    Proof,
    ask,
    check_answer,
    connected,
    living_nodes,
    on_node,
    refused,
)
from dice_py.compute.worker import Work
from dice_py.errors import InterruptedRunError, UsageError
from dice_py.models.loading import placement
from dice_py.storage.files import make_folder

if TYPE_CHECKING:
    from dice_py.config.shared import DevicesConfig, ModelConfig
    from dice_py.events import Report

_STOPPING = 15.0  # seconds that an actor has to end its worker
_WAITING = 60.0  # seconds until a note tells that an actor waits for its node's resources
_LOSING = 40.0  # seconds until Ray knows for certain that a node is gone: five health checks that fail
_SEEING = 60.0  # seconds that a network file system may take to show a complete shard here
_CARRIED = ("CUBLAS_", "NVIDIA_TF32", "VLLM_", "PYTORCH_", "TORCH", "MKL_", "OMP_", "OPENBLAS_", "ATEN_", "ONEDNN_")
"""Beginnings of environment variables that change what libraries compute, or how: as here, so on every node."""


@dataclass(frozen=True)
class NodeGroup(Group):
    """A group of devices of a node."""

    node_id: str = ""
    cpu_share: int = 1
    """Cores that its actor holds."""
    gpu_count: int = 0


class RayProcess:
    """The worker process of a group on a node, behind its actor; a `GroupProcess`."""

    def __init__(self, group: NodeGroup) -> None:
        import ray

        self._group = group
        options = {
            "num_cpus": group.cpu_share,
            "num_gpus": group.gpu_count,
            "max_restarts": 0,
            "max_concurrency": 4,  # a reply arrives while a poll waits
            "scheduling_strategy": on_node(Node(group.node_id, "", 0, 0)),
        }
        self._actor = ray.remote(**options)(GroupActor).remote()
        self._since = time.monotonic()
        self._log, self._log_start = Path(os.devnull), 0
        self._events: deque[tuple[str, dict[str, Any]]] = deque()
        self.pending: Any = None
        """What `ray.wait` waits for: the start, then the next events. None: its actor does not answer any more."""
        self._has_started = self._told = self._done = False
        self._error: tuple[Exception, float] | None = None  # why there is nothing pending, and since when
        self._failure: Failure | None = None

    @property
    def ended(self) -> bool:
        return self._done and not self._events

    @property
    def has_events(self) -> bool:
        """Whether `receive` has something to say without waiting."""
        return bool(self._events) or self._done

    def submit(self, work: Work, *, log: Path, name: str, environment: Mapping[str, str | None]) -> None:
        make_folder(log.parent)
        self._log, self._log_start = log, log.stat().st_size if log.exists() else 0
        self.pending = self._actor.start.remote(
            work, log=log, name=name, environment=_environment(environment), cwd=str(Path.cwd())
        )

    def reply(self, value: Any) -> None:
        self._actor.reply.remote(value)

    def receive(self, timeout: float) -> tuple[str, dict[str, Any]] | None:
        import ray

        if not self._events and not self._done:
            if self.pending is None:
                self._look_for_reason()
                return None
            ready, _ = ray.wait([self.pending], timeout=timeout)
            if not ready:
                return self._note_of_waiting()
            self._take()
        return self._events.popleft() if self._events else None

    def _take(self) -> None:
        """Takes the answer that is there: of the start, or events."""
        import ray

        try:
            answer = ray.get(self.pending)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            self._events.append(("failed", failure_fields(cause)))
            self._done = True
            return
        except ray.exceptions.RayError as error:
            self.pending, self._error = None, (error, time.monotonic())
            return
        if self._has_started:
            events, failure = answer
            self._events.extend(events)
            if failure is not None:
                self._failure, self._done = failure, True
                return
        self._has_started = True
        self.pending = self._actor.poll.remote()

    def _look_for_reason(self) -> None:
        """Finds out why the actor does not answer. That its node is gone is known some seconds later only."""
        assert self._error is not None
        error, since = self._error
        is_gone = all(node.id != self._group.node_id for node in living_nodes())
        if not is_gone and time.monotonic() - since < _LOSING:
            return
        after = f"after {since - self._since:.0f} s"
        if is_gone:
            text = f"is lost {after}: its node has left the cluster"
            self._failure = Failure("InterruptedRunError", 5, text, died=True, lost=True)
        else:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            text = f"was ended {after} by Ray ({type(error).__name__}: {first})"
            # Ray's monitor ends the processes of a node that runs out of memory.
            kind, code = ("OutOfMemoryError", 4) if "memory" in str(error).lower() else ("InterruptedRunError", 5)
            self._failure = Failure(kind, code, text, died=True)
        self._done = True

    def _note_of_waiting(self) -> tuple[str, dict[str, Any]] | None:
        if self._has_started or self._told or time.monotonic() - self._since < _WAITING:
            return None
        self._told = True
        text = f"waits for {self._group.gpu_count} GPU(s) and {self._group.cpu_share} core(s) that others hold in Ray"
        return "note", {"text": text}

    def failure(self) -> Failure:
        return self._failure or Failure("bug", 1, "ended without a result", died=True)

    def tail(self, lines: int = 30) -> str:
        return log_tail(self._log, self._log_start, lines)

    def join(self, timeout: float | None = None) -> None:
        """Waits until its worker has ended."""
        deadline = time.monotonic() + (timeout or 0.0)
        while not self._done and (timeout is None or time.monotonic() < deadline):
            self.receive(0.5)

    def terminate(self) -> None:
        if self._has_started and not self._done and self._error is None:
            self._actor.stop.remote()

    def stop(self) -> None:
        import ray

        if self._has_started and self._failure is None and self._error is None:
            with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
                ray.get(self._actor.stop.remote(), timeout=_STOPPING)
        ray.kill(self._actor)
        self._done = True
        self._events.clear()


def _environment(environment: Mapping[str, str | None]) -> dict[str, str | None]:
    """The variables of a worker on a node: those of here that change what libraries compute, then the group's own.

    Ray sets OMP_NUM_THREADS for its own processes.
    """
    here: dict[str, str | None] = {"OMP_NUM_THREADS": None}
    here |= {name: value for name, value in os.environ.items() if name.startswith(_CARRIED)}
    return here | dict(environment)


class RayExecutor:
    """The groups of a cluster's nodes, for one stage."""

    def __init__(self, devices: DevicesConfig, models: ModelConfig, size: int, proof: Proof, report: Report) -> None:
        self._devices, self._size, self._proof, self._report = devices, size, proof, report
        with cuda_unstarted():
            self._placement = placement(models)
        self.on_gpus = self._placement.device.startswith("cuda")
        self._groups: list[NodeGroup] = []
        self._asked: dict[str, tuple[Node, Any, float]] = {}  # nodes that have not proved themselves yet
        self._known: set[str] = set()  # ids of all nodes that were asked
        self._kinds: set[str] = set()
        self._looked = False

    def groups(self) -> list[Group]:
        """The groups of the nodes that are alive and have proved themselves; the first call waits for the proofs.

        Raises:
            UsageError: a node that cannot do the work of this run.
        """
        alive = {node.id: node for node in living_nodes() if (node.gpus if self.on_gpus else node.cpus)}
        for node in alive.values():
            if node.id not in self._known:
                self._asked[node.id] = (node, ask(node, self._proof), time.monotonic())
                self._known.add(node.id)
        self._admit(wait=not self._looked)
        there: list[Group] = [group for group in self._groups if group.node_id in alive]
        if not self._looked:
            nodes = len({group.node for group in there})
            self._report("note", text=f"{nodes} node(s) of the Ray cluster, {len(there)} group(s) of devices")
        self._looked = True
        return there

    def _admit(self, *, wait: bool) -> None:
        """Takes in the nodes whose answers are there; with `wait`, after all have answered."""
        import ray

        pending = [answer for _, answer, _ in self._asked.values()]
        if not pending:
            return
        ready = ray.wait(pending, num_returns=len(pending), timeout=PROVING if wait else 0)[0]
        for node, answer, since in list(self._asked.values()):
            if answer in ready:
                del self._asked[node.id]
                if check_answer(node, answer, self._proof):
                    self._add(node)
            elif time.monotonic() - since > PROVING:
                raise refused(node, f"has not proved within {PROVING:.0f} s that it sees the run folder")

    def _add(self, node: Node) -> None:
        """Makes the groups of a node."""
        first = self._groups[-1].number + 1 if self._groups else 1
        if self.on_gpus:
            count, cpus, threads, gpus = node.gpus // self._size, min(1, node.cpus), None, self._size
        else:
            count = min(self._devices.cpu_processes, node.cpus)
            cpus = threads = node.cpus // count
            gpus = 0
        for number in range(first, first + count):
            self._groups.append(
                NodeGroup(number, (), threads, True, node.name, node_id=node.id, cpu_share=cpus, gpu_count=gpus)
            )
        if self.on_gpus and node.gpus % self._size:
            text = f"node {node.name}: {node.gpus % self._size} GPU(s) stay idle: a group takes {self._size}"
            self._report("note", text=text)
        if node.kind is not None and self._kinds and node.kind not in self._kinds:
            others = ", ".join(sorted(self._kinds))
            self._report(
                "note", text=f"{node.name} has other GPUs ({node.kind}) than {others}: results may differ by kind"
            )
        self._kinds |= {node.kind} if node.kind is not None else set()
        self._report("node", name=node.name, cpus=node.cpus, gpus=node.gpus, groups=count)
        if self._looked:
            self._report("note", text=f"node {node.name} has joined, with {count} group(s) of devices")

    def start(self, group: Group) -> RayProcess:
        assert isinstance(group, NodeGroup)
        return RayProcess(group)

    def wait(self, processes: Sequence[GroupProcess], timeout: float) -> None:
        import ray

        ours = [process for process in processes if isinstance(process, RayProcess)]
        if any(process.has_events for process in ours):
            return
        pending = [process.pending for process in ours if process.pending is not None]
        if len(pending) < len(ours):
            timeout = min(timeout, 0.5)  # it is asked of the cluster why
        if pending:
            ray.wait(pending, timeout=timeout)
        else:
            time.sleep(timeout)

    def wait_for_groups(self) -> None:
        known = {group.number for group in self.groups()}
        seconds = self._devices.ray_wait
        self._report(
            "note", text=f"no node of the Ray cluster is there to work: waiting for one, up to {seconds:.0f} s"
        )
        deadline = time.monotonic() + seconds
        while not any(group.number not in known for group in self.groups()):
            if time.monotonic() > deadline:
                kind = "GPUs" if self.on_gpus else "cores"
                raise InterruptedRunError(
                    f"the Ray cluster has had no node with {kind} for {seconds:.0f} s (devices.ray_wait); completed "
                    "shards are kept: bring nodes back, then `dice resume` the run"
                )
            time.sleep(1.0)

    def sees(self, is_complete: Callable[[int], bool], number: int, folder: Path) -> bool:
        deadline = time.monotonic() + _SEEING
        while not is_complete(number):
            if time.monotonic() > deadline:
                return False
            list(folder.iterdir())  # NFS looks at the folder anew, and not only at what it remembers of it
            time.sleep(0.2)
        return True

    def runs_here(self, groups: Sequence[Group]) -> bool:
        return False

    def models(self, models: ModelConfig) -> ModelConfig:
        """With the device and the dtype of here, which keys have: a node's own choice could differ."""
        device = "cuda:0" if self.on_gpus else "cpu"
        return models.model_copy(update={"device": device, "dtype": self._placement.dtype})


@contextlib.contextmanager
def open_ray(
    devices: DevicesConfig,
    models: ModelConfig,
    *,
    size: int,
    folder: Path,
    needs: Sequence[Path],
    report: Report,
) -> Iterator[RayExecutor]:
    """The executor of a cluster, for one stage; arguments and errors as of `compute.dispatch.open_executor`.

    The kind of device is that of here: on a machine without a GPU, only the cores of the nodes are used.
    """
    with connected(devices), contextlib.closing(Proof.of(folder, needs)) as proof:
        executor = RayExecutor(devices, models, size, proof, report)
        _check_kind(models, executor.on_gpus)
        yield executor


def _check_kind(models: ModelConfig, on_gpus: bool) -> None:
    """Refuses to use the cores of a cluster with GPUs unless that is asked for."""
    with_gpus = [node.name for node in living_nodes() if node.gpus]
    if models.device == "auto" and not on_gpus and with_gpus:
        raise UsageError(
            f"the Ray cluster has GPUs ({with_gpus[0]}), but this machine has none, and its kind of device is that of "
            "the whole run: start dice on a node with a GPU, which trains and evaluates too, or set model.device=cpu"
        )
