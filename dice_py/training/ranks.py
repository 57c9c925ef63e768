"""Runs a training in its processes: in this one, or in ranks that accelerate, Ray Train, or torchrun by srun start."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dice_py.compute.devices import Group, only_these_gpus
from dice_py.compute.worker import Work
from dice_py.config.shared import DevicesConfig
from dice_py.config.training import TrainConfig
from dice_py.events import Report
from dice_py.training.launcher import launch, launch_by
from dice_py.training.parallelism import ProcessLayout, accelerate_environment, write_accelerate_config
from dice_py.training.ray_launcher import launch_on_ray
from dice_py.training.slurm import start_by_srun, this_host

_MODULE = "dice_py.training.launcher"


def run_ranks(
    layout: ProcessLayout,
    work: Work,
    config: TrainConfig,
    *,
    out: Path,
    devices: DevicesConfig | None,
    needs: Sequence[Path],
    report: Report,
) -> None:
    """Calls `work(report=…)` in every process of a layout, and waits for all of them.

    Args:
        config: how the processes share the model.
        out: the folder of accelerate's config.
        needs: the models that other nodes must see.

    Raises:
        DiceError: as raised by a rank.
        OutOfMemoryError: on any rank.
    """
    if layout.strategy == "none":
        with only_these_gpus(Group(1, layout.gpus)) if layout.gpus else contextlib.nullcontext():
            work(report=report)
        return
    file = write_accelerate_config(layout, config, out)
    if layout.nodes > 1:
        _launch_over_nodes(layout, file, work, devices, out, needs, report)
        return
    environment: dict[str, str] = {}
    if layout.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(layout.gpus)
    environment |= _threads(layout.processes)
    report("note", text=f"training runs in {layout.processes} processes ({layout.strategy}, {file})")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), "--module", _MODULE]
    launch(command, layout.processes, work, environment=environment, report=report)


def _launch_over_nodes(
    layout: ProcessLayout,
    file: Path,
    work: Work,
    devices: DevicesConfig | None,
    out: Path,
    needs: Sequence[Path],
    report: Report,
) -> None:
    environment = accelerate_environment(file)
    each = layout.processes // layout.nodes
    what = f"{layout.nodes} nodes with {each} process{'es' if each > 1 else ''} each ({layout.strategy}, {file})"
    report("note", text=f"training runs on {what}, started by {'Ray Train' if layout.by == 'ray' else 'srun'}")
    if layout.by == "ray":
        assert devices is not None
        launch_on_ray(
            layout, work, devices=devices, environment=environment, folder=out, needs=list(needs), report=report
        )
        return
    environment |= _threads(each)
    launch_by(
        lambda address, secret: start_by_srun(layout, environment, address, secret, module=_MODULE),
        layout.processes,
        work,
        host=this_host(),
        report=report,
    )


def _threads(processes: int) -> dict[str, str]:
    """The variable for the threads of so many processes of a machine, unless the user has set it."""
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // processes))}
