"""The loop: the models of each stage of a round, and the keys that follow from them. No model is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from own_run import SAMPLES

from dice_py.config.rounds import RoundsConfig
from dice_py.config.run import RunConfig
from dice_py.runs import loop
from dice_py.runs.folder import Run
from dice_py.stages.evaluate import EvaluateJob
from dice_py.stages.generate import GenerateJob
from dice_py.stages.job import Job, StageResult
from dice_py.stages.preflight import PreflightJob
from dice_py.stages.registry import ROUND_STAGES
from dice_py.stages.replay import ReplayJob
from dice_py.stages.score import ScoreJob
from dice_py.stages.train import TrainJob
from dice_py.storage.files import read_json, write_json
from dice_py.storage.parquet import write_parquet
from dice_py.storage.schemas import GENERATIONS, SCORES


def faked_stages(monkeypatch: pytest.MonkeyPatch, config: RunConfig, folder: Path) -> list[tuple[Any, ...]]:
    """Runs the loop with stages that run no model; returns (stage, models that it was given)."""
    given: list[tuple[Any, ...]] = []

    def spawn(self: Run, job: Job, folder: Path, **_: Any) -> StageResult:
        if isinstance(job, GenerateJob):
            given.append(("generate", job.policy))
            file = job.out / "generations-00000.parquet"
            key = f"round {job.round_number}"
            rows = [(p, s, [1], [1], "x", 1 + s, 1 + s, "stop", 0.0) for p in range(3) for s in range(SAMPLES)]
            write_parquet(file, pl.DataFrame(rows, schema=GENERATIONS, orient="row"), key=key)
            return StageResult([(file, key)], {"responses": len(rows), "prompts": 3})
        if isinstance(job, ScoreJob):
            given.append(("score", job.policy, job.reference))
            file = job.out / "scores-00000.parquet"
            rows = [(0.0, 0.0, 0.1 * (n % 5)) for n in range(3 * SAMPLES)]
            write_parquet(file, pl.DataFrame(rows, schema=SCORES, orient="row"), key=job.shard_keys()[0])
            return StageResult([(file, job.shard_keys()[0])], {})
        if isinstance(job, ReplayJob):
            file = job.out / "training_set.parquet"
            write_parquet(file, pl.DataFrame({"none": [0]}), key=job.key())
            return StageResult([(file, job.key())], {})
        if isinstance(job, TrainJob):
            given.append(("train", job.policy))
            write_json(job.target / "dice.json", {"key": job.key()})
            return StageResult([(job.target, job.key())], {})
        if isinstance(job, EvaluateJob):
            given.append(("evaluate", job.policy, job.reference, job.start, job.initial_reference))
            write_json(job.out / "metrics.json", {})
            return StageResult([(job.out / "metrics.json", "metrics")], {})
        assert isinstance(job, PreflightJob)
        return StageResult([], {})

    monkeypatch.setattr(Run, "spawn", spawn)
    loop.run(config, folder)
    return given


@pytest.mark.parametrize("reward_reference", ["previous", "initial"])
def test_the_reference_moves_or_stays(
    config: RunConfig, reward_reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config.model_copy(update={"rounds": RoundsConfig(count=3), "reward_reference": reward_reference})
    folder = tmp_path / "run"
    given = faked_stages(monkeypatch, config, folder)
    first, initial = Path(str(config.model.policy)), Path(str(config.model.reference))
    policies = [first, *(folder / f"round-{number:02d}" / "train" / "model" for number in (1, 2, 3))]
    # Round t's rewards are log π_t − log π_ref; after it, the next round's are what is measured.
    references = [initial, *policies[:3]] if reward_reference == "previous" else [initial] * 4
    expected: list[tuple[Any, ...]] = []
    for t in range(3):
        expected += [
            ("generate", policies[t]),
            ("score", policies[t], references[t]),
            ("train", policies[t]),
            ("evaluate", policies[t + 1], references[t + 1], first, initial),
        ]
    assert given == expected
    # The order of the work says nothing of what a resume takes for granted; the keys do.
    stages = read_json(folder / "manifest.json")["stages"]
    assert len({stages[f"round-{number:02d}/score"]["key"] for number in (1, 2, 3)}) == 3


def test_another_reference_is_another_key(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {}
    for name in ("previous", "initial"):
        changed = config.model_copy(update={"rounds": RoundsConfig(count=2), "reward_reference": name})
        faked_stages(monkeypatch, changed, tmp_path / name)
        keys[name] = {
            stage: entry["key"] for stage, entry in read_json(tmp_path / name / "manifest.json")["stages"].items()
        }
    same = {stage for stage, key in keys["previous"].items() if keys["initial"][stage] == key}
    first = [f"round-01/{stage}" for stage in ROUND_STAGES if stage != "evaluate"]
    assert same == {*first, "round-02/generate"}
