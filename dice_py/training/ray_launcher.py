"""Starts the ranks of a training on the nodes of a Ray cluster, by Ray Train's TorchTrainer.

Ray Train places the workers, one a rank, and joins them in a process group. Each then runs the same rank as on one
machine (`run_rank`), which connects to the stage. Nothing else of Ray Train is used: checkpoints, reports and results
go the way that they go on one machine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dice_py.compute.ray_cluster import Proof, connected, enter, living_nodes, prove
from dice_py.compute.worker import Work
from dice_py.config.shared import DevicesConfig
from dice_py.storage.files import TEMPORARY
from dice_py.training.launcher import launch_by, run_rank
from dice_py.training.parallelism import ProcessLayout

if TYPE_CHECKING:
    from dice_py.events import Report

_STOPPING = 20.0  # seconds that Ray Train has to end its workers


def rank_of_ray(config: dict[str, Any]) -> None:
    """A worker of Ray Train: runs a rank. Its number, and the process group, are Ray's."""
    enter(config["cwd"])
    os.environ.update(config["environment"])
    if run_rank(config["address"], config["secret"]):
        raise RuntimeError("the rank failed; the stage of the training tells why")


def launch_on_ray(
    layout: ProcessLayout,
    work: Work,
    *,
    devices: DevicesConfig,
    environment: Mapping[str, str],
    folder: Path,
    needs: Sequence[Path],
    report: Report,
) -> Any:
    """`launch_by` Ray Train, on nodes that have proved that they see the run folder.

    Args:
        environment: variables of every rank.
        folder: of the stage.
        needs: the model folders that the ranks read.
    """
    with connected(devices), contextlib.closing(Proof.of(folder, needs)) as proof:
        import ray

        able = [node for node in living_nodes() if (node.gpus if layout.device == "cuda" else node.cpus)]
        prove(proof, able)
        each = layout.processes // layout.nodes
        threads = max(1, min(node.cpus for node in able) // each)
        cpus = threads if layout.device == "cpu" else 1
        variables = {**environment, "OMP_NUM_THREADS": str(threads)}
        scratch = folder / f".ray-train{TEMPORARY}"
        return launch_by(
            lambda address, secret: RayLauncher(layout, variables, cpus, scratch, address, secret),
            layout.processes,
            work,
            host=ray.util.get_node_ip_address(),
            report=report,
        )


class RayLauncher:
    """A `Launcher` whose ranks are workers of Ray Train. It is connected to the cluster already.

    Args:
        environment: variables of every rank.
        cpus: cores that each rank has.
        folder: a temporary one on the shared file system, which Ray Train wants for its own.
    """

    def __init__(
        self, layout: ProcessLayout, environment: Mapping[str, str], cpus: int, folder: Path, address: str, secret: str
    ) -> None:
        self.output: deque[str] = deque(maxlen=40)
        self._code: int | None = None
        self._folder = folder
        config = {"address": address, "secret": secret, "environment": dict(environment), "cwd": str(Path.cwd())}
        arguments = (layout, config, cpus)
        self._thread = threading.Thread(target=self._train, args=arguments, daemon=True)
        self._thread.start()

    def _train(self, layout: ProcessLayout, config: dict[str, Any], cpus: int) -> None:
        try:
            from ray.train import FailureConfig, RunConfig, ScalingConfig
            from ray.train.torch import TorchTrainer

            resources: dict[str, float] = {"CPU": cpus}
            if layout.device == "cuda":
                resources["GPU"] = 1
            TorchTrainer(
                rank_of_ray,
                train_loop_config=config,
                scaling_config=ScalingConfig(
                    num_workers=layout.processes,
                    use_gpu=layout.device == "cuda",
                    resources_per_worker=resources,
                    placement_strategy="PACK" if layout.device == "cuda" else "SPREAD",
                ),
                run_config=RunConfig(
                    name="train",
                    storage_path=str(self._folder.absolute()),
                    failure_config=FailureConfig(max_failures=0),
                ),
            ).fit()
            self._code = 0
        except BaseException as error:
            self.output.extend(f"{type(error).__name__}: {error}".splitlines())
            self._code = 1

    def poll(self) -> int | None:
        return self._code

    def finish(self) -> None:
        self._thread.join(_STOPPING)
        shutil.rmtree(self._folder, ignore_errors=True)

    def stop(self) -> None:
        """The ranks have ended by themselves, since the stage has closed their connections."""
        self._thread.join(_STOPPING)
        with contextlib.suppress(OSError):
            shutil.rmtree(self._folder, ignore_errors=True)
