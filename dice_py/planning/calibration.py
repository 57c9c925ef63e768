"""Measures the costs of the stages in three short processes: sampling, scoring, training.

Each imports what its stage's process imports, so that the start-up times of the stages are measured too.
"""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from dice_py.compute.stage_process import run_in_subprocess
from dice_py.compute.worker import Worker, work_name
from dice_py.config.run import RunConfig
from dice_py.events import Report
from dice_py.generation.engines.vllm_on_cpu import Workload
from dice_py.planning.calibrate_generation import GENERATED, Probe, probe
from dice_py.planning.calibrate_training import TRAINING_PAIRS, measure_score, measure_train
from dice_py.runs.inputs import Inputs
from dice_py.runs.measured_costs import GenerateCosts, ScoreCosts, StageCosts, TrainCosts
from dice_py.stages.registry import REGISTRY

T = TypeVar("T")


class SubprocessRunner:
    """Runs work in processes of its own, one after the other, and measures how long each takes to start.

    Args:
        folder: where their logs are written.
        report: receives their notes and progress.
    """

    def __init__(self, folder: Path, report: Report) -> None:
        self.folder, self.report = folder, report
        self.startup: dict[str, float] = {}
        """By stage: seconds until its process has imported what it needs."""

    def run(self, stage: str, work: partial[T]) -> T:
        """Calls `work(report=…)` in a process that has imported what the process of `stage` imports."""

        def on_event(event: str, **fields: Any) -> None:
            if event == "process" and fields["work"] == work_name(work):
                # The process gets its work at once, so that its imports count as `spawn`.
                self.startup[stage] = fields["seconds"]["spawn"] + fields["seconds"]["import"]
            elif event in ("note", "progress"):
                self.report(event, **fields)

        log = self.folder / f"{stage}.log"
        warm = Worker(REGISTRY[stage].imports, log)
        result: T = run_in_subprocess(work, log=log, remedy=REGISTRY[stage].remedy, report=on_event, warm=warm)
        return result


def run_probe(
    config: RunConfig,
    inputs: Inputs,
    runner: SubprocessRunner,
    measure: Literal["costs", "lengths", "nothing"],
    workload: Workload,
) -> Probe:
    """`probe` in a process of its own; the responses that it samples are in the runner's folder."""
    work = partial(
        probe,
        config=config,
        policy=inputs.policy,
        prompts=inputs.prompts,
        eval_prompts=inputs.eval_prompts,
        workload=workload,
        out=runner.folder / "generate",
        measure=measure,
    )
    return runner.run("generate", work)


def sampled_file(runner: SubprocessRunner) -> Path:
    """The responses that `run_probe` sampled."""
    return runner.folder / "generate" / GENERATED


def calibrate(config: RunConfig, inputs: Inputs, probed: Probe, runner: SubprocessRunner) -> StageCosts:
    """The costs of all stages: of sampling from `probed`, of scoring and training measured now."""
    assert probed.generate is not None
    score = runner.run(
        "score",
        partial(
            measure_score,
            config=config,
            policy=inputs.policy,
            reference=inputs.reference,
            generations=sampled_file(runner),
            prompts=inputs.prompts,
            offline=inputs.offline,
            gpus=probed.gpu_names,
            threads=probed.threads,
            out=runner.folder / "score",
        ),
    )
    train = runner.run(
        "train",
        partial(
            measure_train,
            config=config,
            policy=inputs.policy,
            training_set=runner.folder / "score" / TRAINING_PAIRS,
            out=runner.folder / "train",
        ),
    )
    return calibrated_costs(probed.generate, score, train, runner.startup)


def calibrated_costs(
    generate: GenerateCosts, score: ScoreCosts, train: TrainCosts, startup: dict[str, float]
) -> StageCosts:
    """The costs of a calibration.

    Args:
        startup: seconds to start the processes of generate, score and train.
    """
    return StageCosts(
        source="calibration",
        when=time.time(),
        # Replay imports what score does, and evaluation what generate and score do.
        startup={
            "generate": startup["generate"],
            "score": startup["score"],
            "replay": startup["score"],
            "train": startup["train"],
            "evaluate": max(startup["generate"], startup["score"]),
        },
        generate=generate,
        score=score,
        train=train,
        evaluate=None,
    )


def note_load(report: Report) -> None:
    """Reports a note where other programs keep the cores busy, since costs measured then are too high."""
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load > cores / 2:
        report(
            "note",
            text=f"other programs keep this machine busy (load {load:.1f} on {cores} cores): the costs measured now "
            "may be far higher than those of a run alone; plan again with --fresh when they have ended",
        )
