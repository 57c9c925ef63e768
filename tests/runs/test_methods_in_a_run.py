"""Every training method through two rounds of the embedded default, on a small world: labels, references, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from own_run import Events

from dice_py.config.loading import resolve
from dice_py.config.run import RunConfig
from dice_py.runs import loop
from dice_py.storage.files import read_json

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("inline_stages")]

SMALL = [
    "rounds=2", "world.sft_steps=60", "world.offline_pairs=120", "world.round_prompts=60", "world.eval_prompts=8",
    "world.eval_pairs=8", "data.prompts_per_round=24", "generate.samples=4", "generate.shard_prompts=24",
    "generate.engine=transformers", "model.device=cpu", "train.max_steps=2", "train.batch_size=8",
    "train.per_device_train_batch_size=8", "train.save_steps=null", "train.logging_steps=1", "evaluate.prompts=4",
    "evaluate.samples=1", "evaluate.pairs=4",
]  # fmt: skip
RUNS = {
    "rdpo": ["train.method=rdpo"],
    "sppo": ["train.method=sppo", "replay.buffer.capacity=20"],
    "cream": ["train.method=cream"],
    "spa": ["train.method=spa", "mine.difficulty_quantile=0.5"],
    "soft": ["train.method=soft", "train.weight_column=margin"],
    "all of TRL": [
        "train.loss=[{type: sigmoid, weight: 0.8}, {type: ipo, weight: 0.01}]", "train.ld_alpha=0.5",
        "train.reference=initial", "train.trainer_args={adam_epsilon: 1.0e-7}",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One world for all runs."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def shared_cache(cache: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DICE_CACHE", str(cache))


def training_sets(folder: Path) -> list[pl.DataFrame]:
    return [pl.read_parquet(folder / f"round-{n:02d}/replay/training_set.parquet") for n in (1, 2)]


def logged(folder: Path, number: int) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = read_json(folder / f"round-{number:02d}/train/model/train_log.json")
    return entries


def check_columns(name: str, config: RunConfig, folder: Path) -> None:
    """What each method left in the run's files."""
    manifest = read_json(folder / "manifest.json")["stages"]
    first, second = training_sets(folder)
    mined = [frame.filter(pl.col("source") == "mined") for frame in (first, second)]
    if name == "rdpo":
        for number in (1, 2):
            alpha = manifest[f"round-{number:02d}/mine"]["counts"]["alpha"]
            assert manifest[f"round-{number:02d}/replay"]["counts"]["mined_alpha"] == alpha
    if name == "sppo":
        for frame in mined:
            assert (frame["chosen_win_rate"] > frame["rejected_win_rate"]).all()
        older = second.filter(pl.col("source") == "replay:rounds")
        assert older.height > 0
        assert older["chosen_win_rate"].null_count() == 0
    if name == "cream":
        scores = [pl.read_parquet(folder / f"round-{n:02d}/score/scores-00000.parquet") for n in (1, 2)]
        assert ["previous_reward" in frame.columns for frame in scores] == [False, True]
        # In round 2 the policy of round 1 is the reference, and its reward was against the first one.
        assert scores[1]["previous_reward"].abs().max() > 0.01
        assert all(frame["consistency"].is_between(0, 1).all() for frame in mined)
    if name == "spa":
        assert set(second["difficulty"].drop_nulls()) == {"hard", "easy"}
        # Rewards are against the first reference, in both rounds.
        assert config.reward_reference == "initial"
    if name == "all of TRL":
        assert {"start_chosen_logps", "ref_chosen_shared_logps"} <= set(first.columns)
        # In round 1 the start is not the reference either: it is the world's policy, trained from the reference.
        difference = second.select((pl.col("start_chosen_logps") - pl.col("ref_chosen_logps")).abs().mean()).item()
        assert difference > 0.01


@pytest.mark.parametrize(
    "name",
    [name if name in ("cream", "all of TRL") else pytest.param(name, marks=pytest.mark.long) for name in RUNS],
)
def test_two_rounds(tmp_path: Path, name: str) -> None:
    config = resolve([], [*SMALL, *RUNS[name]])
    folder = tmp_path / "run"
    metrics = loop.run(config, folder)
    assert list(metrics) == ["round-01", "round-02"]
    for number in (1, 2):
        counts = read_json(folder / "manifest.json")["stages"][f"round-{number:02d}/train"]["counts"]
        assert counts["step0_loss"] == pytest.approx(0.693147, abs=1e-3)
        assert counts["steps"] == 2
        assert logged(folder, number)[0]["loss"] > 0
    check_columns(name, config, folder)
    events = Events()
    loop.resume(folder, events)
    assert {status for _, status in events.stages()} == {"kept"}


def test_another_method_on_resume_mines_and_trains_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    loop.run(resolve([], [*SMALL, "rounds=1"]), folder)
    events = Events()
    loop.resume(folder, events, assignments=["train.method=soft"])
    statuses = dict(events.stages())
    assert [statuses[f"round-01/{stage}"] for stage in ("generate", "score", "mine", "train")] == [
        "kept", "kept", "done", "done",
    ]  # fmt: skip
    assert "soft_label" in pl.read_parquet(folder / "round-01/replay/training_set.parquet").columns
