"""The reward of the round before, in the score stage: a third model, its passes, its files and its key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from tiny_models import make_llama
from tiny_stage import BETA, Stage

from dice_py.config.stages import ScoreConfig
from dice_py.scoring import shards
from dice_py.stages.score import ScoreJob
from dice_py.storage.schemas import SCORES_WITH_PREVIOUS


@pytest.fixture
def stage(llama: Path, other: Path, tmp_path: Path) -> Stage:
    return Stage(llama, other, tmp_path)


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("earlier") / "model", seed=9)


def read(stage: Stage) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(file) for file in stage.files])


@pytest.mark.parametrize(("role", "sign"), [("policy", 1.0), ("reference", -1.0)])
def test_the_reward_of_the_round_before(
    stage: Stage, llama: Path, other: Path, earlier: Path, tmp_path: Path, role: Any, sign: float
) -> None:
    stage(previous=(earlier, role))
    scores = read(stage)
    assert scores.schema == SCORES_WITH_PREVIOUS
    # The same model scored as a policy, in a stage of its own.
    (tmp_path / "alone").mkdir()
    alone = Stage(earlier, other, tmp_path / "alone")
    alone()
    expected = read(alone).select(previous=sign * BETA * (pl.col("logp") - pl.col("ref_logp"))).to_series()
    assert (scores["previous_reward"] - expected).abs().max() < 1e-5
    assert scores["previous_reward"].abs().max() > 0.01
    assert {fields["model"] for kind, fields in stage.events if kind == "throughput"} == {
        "reference", "previous", "policy",
    }  # fmt: skip
    assert [fields["done"] for kind, fields in stage.events if kind == "progress"][-1] == 27  # nine under three models
    assert sorted(file.name for file in stage.out.glob("*-logps-*")) == []


def test_an_interrupted_stage_keeps_the_passes_that_are_done(
    stage: Stage, earlier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage(previous=(earlier, "policy"))
    complete = read(stage)
    for file in stage.files:
        file.unlink()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_scores", stop)
        with pytest.raises(KeyboardInterrupt):
            stage(previous=(earlier, "policy"))
    assert len(list(stage.out.glob("previous-logps-*"))) == len(list(stage.out.glob("ref-logps-*"))) == 2
    stage(previous=(earlier, "policy"))
    assert {fields["model"] for kind, fields in stage.events if kind == "throughput"} == {"policy"}
    assert_frame_equal(read(stage), complete)


def test_the_key_has_the_third_model(llama: Path, other: Path, earlier: Path, tmp_path: Path) -> None:
    from tiny_sets import CPU

    def key(previous: Any) -> str:
        return ScoreJob(ScoreConfig(), CPU, llama, other, [], [], tmp_path, 0.1, previous=previous).key()

    keys = {key(None), key((earlier, "policy")), key((earlier, "reference")), key((other, "policy"))}
    assert len(keys) == 4
    fields = ScoreJob(ScoreConfig(), CPU, llama, other, [], [], tmp_path, 0.1).key_fields()
    assert "previous" not in fields  # keys of runs without it stay
