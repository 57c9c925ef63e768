"""Stages that run no model, for tests of the loop over rounds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from own_run import SAMPLES

from dice_py.runs.folder import Run
from dice_py.stages.evaluate import EvaluateJob
from dice_py.stages.generate import GenerateJob
from dice_py.stages.inspect import InspectJob
from dice_py.stages.job import Job, StageResult
from dice_py.stages.preflight import PreflightJob
from dice_py.stages.replay import ReplayJob
from dice_py.stages.score import ScoreJob
from dice_py.stages.train import TrainJob
from dice_py.storage.files import write_sealed
from dice_py.storage.integrity import write_stamp
from dice_py.storage.parquet import write_parquet
from dice_py.storage.schemas import GENERATIONS, SCORES

CUT_OFF = [(0, 3), (1, 3)]
"""Prompt and sample of the responses that the token limit cut off."""


def no_evaluation(job: EvaluateJob) -> StageResult:
    """Measures nothing."""
    write_sealed(job.out / "metrics.json", {}, job.key())
    return StageResult([(job.out / "metrics.json", job.key())], {})


def faked_stages(
    monkeypatch: pytest.MonkeyPatch,
    evaluation: Callable[[EvaluateJob], StageResult] = no_evaluation,
    *,
    weights: bool = False,
) -> list[tuple[Any, ...]]:
    """Makes the loop run stages that need no model; returns (stage, models that it was given), as they are called.

    Args:
        evaluation: does the work of an evaluation.
        weights: trained models have a file of weights, of their own.
    """
    given: list[tuple[Any, ...]] = []

    def spawn(self: Run, job: Job, folder: Path, **_: Any) -> StageResult:
        if isinstance(job, GenerateJob):
            given.append(("generate", job.policy))
            file = job.out / "generations-00000.parquet"
            key = f"round {job.round_number}"
            rows = [
                (p, s, [1], [1] * (1 + s), "x" * (1 + s), 1 + s, 1 + s, "length" if (p, s) in CUT_OFF else "stop", 0.0)
                for p in range(3)
                for s in range(SAMPLES)
            ]
            write_parquet(file, pl.DataFrame(rows, schema=GENERATIONS, orient="row"), key=key)
            return StageResult([(file, key)], {"responses": len(rows), "prompts": 3, "cut_off": len(CUT_OFF)})
        if isinstance(job, ScoreJob):
            given.append(("score", job.policy, job.reference))
            rows = [(0.0, 0.0, 0.1 * (n % 5)) for n in range(3 * SAMPLES)]
            frame, made = pl.DataFrame(rows, schema=SCORES, orient="row"), []
            for number, key in enumerate(job.shard_keys()):
                file = write_parquet(job.out / f"scores-{number:05d}.parquet", frame, key=key)
                made.append((file, key))
            return StageResult(made, {})
        if isinstance(job, ReplayJob):
            file = job.out / "training_set.parquet"
            write_parquet(file, pl.DataFrame({"none": [0]}), key=job.key())
            return StageResult([(file, job.key())], {})
        if isinstance(job, InspectJob):
            write_sealed(job.distributions_file, {}, job.key())
            write_parquet(job.pairs_file, pl.DataFrame({"none": [0]}), key=job.key())
            return StageResult([(file, job.key()) for file in (job.distributions_file, job.pairs_file)], {})
        if isinstance(job, TrainJob):
            given.append(("train", job.policy))
            if weights:
                job.target.mkdir(parents=True, exist_ok=True)
                (job.target / "model.safetensors").write_bytes(job.key().encode() * 100)
            write_stamp(job.target, {"key": job.key(), "counts": {}})
            return StageResult([(job.target, job.key())], {})
        if isinstance(job, EvaluateJob):
            given.append(("evaluate", job.policy, job.reference, job.start, job.initial_reference))
            return evaluation(job)
        assert isinstance(job, PreflightJob)
        return StageResult([], {})

    monkeypatch.setattr(Run, "spawn", spawn)
    return given
