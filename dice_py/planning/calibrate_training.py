"""The second process of `dice plan`: measures scoring, and then training, with steps as long as there is time for.

Clipping and the update of the weights cost the same whatever a step's tokens, and are timed apart from the forward and
backward passes, so that a small step shows what a large one costs.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.config.run import RunConfig
from dice_py.config.training import TrainConfig
from dice_py.events import Report, no_report
from dice_py.models.loading import placement, release_held
from dice_py.planning.calibrate_scoring import TRAINING_PAIRS, measure_score
from dice_py.planning.calibration_sizes import Training, per_device_pairs
from dice_py.runs.measured_costs import ScoreCosts, TrainCosts
from dice_py.storage.parquet import read_parquet
from dice_py.timing import timed_seconds
from dice_py.training.parallelism import ProcessLayout


def measure_score_and_train(
    *,
    config: RunConfig,
    policy: Path,
    reference: Path,
    generations: Path,
    prompts: Path,
    offline: Path | None,
    gpus: tuple[str, ...],
    threads: int | None,
    layout: ProcessLayout,
    out: Path,
    report: Report = no_report,
) -> tuple[ScoreCosts, TrainCosts]:
    """The costs of both, in one process, since the start of another would take longer than what it measures.

    Args: as of `measure_score`.
    """
    import torch

    trained_on = torch.get_num_threads()
    score, size = measure_score(
        config=config, policy=policy, reference=reference, generations=generations, prompts=prompts, offline=offline,
        gpus=gpus, threads=threads, layout=layout, out=out, report=report,
    )  # fmt: skip
    torch.set_num_threads(trained_on)
    release_held()
    train = measure_train(
        config=config, policy=policy, training_set=out / TRAINING_PAIRS, size=size, out=out / "stage", report=report
    )
    return score, train


def measure_train(
    *, config: RunConfig, policy: Path, training_set: Path, size: Training, out: Path, report: Report = no_report
) -> TrainCosts:
    """Costs of training, from a few optimizer steps.

    Args:
        training_set: the pairs that `measure_score` wrote, as many as `size` needs.
    """
    from dice_py.compute.memory import peak_memory
    from dice_py.stages.train import TrainJob

    settings = training_settings(config, size)
    report("note", text=f"calibrating: training {size.steps} steps of {size.batch} pairs")
    step_ends: list[float] = []
    updates: list[float] = []
    save, checkpoint_bytes = 0.0, 0

    def on_event(event: str, **fields: Any) -> None:
        nonlocal save, checkpoint_bytes
        if event == "progress" and fields.get("unit") == "steps":
            step_ends.append(time.monotonic())
        elif event == "update":
            updates.append(fields["seconds"])
        elif event == "checkpoint":
            save = fields["seconds"]
            files = (out / "checkpoints" / f"checkpoint-{size.steps}").rglob("*")
            checkpoint_bytes = sum(file.stat().st_size for file in files if file.is_file())

    job = TrainJob(
        config=settings, models=config.model, policy=policy, training_set=training_set, training_set_key="calibration",
        out=out, beta=config.beta, seed=config.seed, devices=config.devices, time_updates=True,
    )  # fmt: skip
    loaded, began = timed_seconds().get("load", 0.0), time.monotonic()
    job.run(on_event)
    total = time.monotonic() - began
    load = timed_seconds().get("load", 0.0) - loaded
    step, update = step_costs(step_ends, updates)
    pair_tokens = _sequence_tokens(training_set)
    per_token = max(0.0, step - update) / (size.batch * pair_tokens)
    # The check is one forward, in 16 bit two; forward and backward are three.
    check = per_token * (1 if placement(config.model).dtype == "float32" else 2) / 3
    checked = check * settings.step0_pairs * pair_tokens
    return TrainCosts(
        load=load,
        fixed=max(0.0, total - load - size.steps * step - save - checked),
        per_token=per_token,
        per_update=update,
        check_per_token=check,
        save=save,
        checkpoint_bytes=checkpoint_bytes,
        peak_bytes=peak_memory(),
    )


def training_settings(config: RunConfig, size: Training) -> TrainConfig:
    """The run's settings with steps of `size`, and at most one checkpoint, at the end.

    The method is DPO, since the pairs have no labels: what methods do with them costs nothing beside the forwards.
    """
    train = config.train
    per_device = per_device_pairs(size.batch, size.processes, train.per_device_train_batch_size)
    return train.model_copy(
        update={
            **train.without_labels(),
            "batch_size": size.batch,
            "processes": size.processes,  # "auto" would be fewer for a smaller batch
            "per_device_train_batch_size": per_device,
            "max_steps": size.steps,
            "save_steps": None if train.save_steps is None else size.steps,
            "step0_pairs": min(train.step0_pairs, size.batch),
            "logging_steps": 1,  # reads the loss, so that a step's end is that of the device
            "max_length": None,
            "report_to": [],
        }
    )


def step_costs(step_ends: Sequence[float], updates: Sequence[float]) -> tuple[float, float]:
    """Seconds of (a step, of these its update), from the times at which steps ended.

    Args:
        updates: seconds of each step's update; the first one also allocates the optimizer's states.
    """
    step = statistics.median(after - before for before, after in itertools.pairwise(step_ends))
    return step, min(step, statistics.median(updates[1:]))


def _sequence_tokens(training_set: Path) -> float:
    """Mean tokens of a pair's two sequences."""
    frame = read_parquet(training_set, ["prompt_ids", "chosen_ids", "rejected_ids"])
    tokens: Sequence[float] = frame.select(pl.all().list.len().mean()).row(0)
    return 2 * tokens[0] + tokens[1] + tokens[2]
