"""The log-probabilities and labels of a training set, where a method needs more than DPO does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_series_equal
from tiny_round import make_round
from tiny_sets import CPU, token_pairs

from dice_py.config.stages import ReplayConfig, ScoreConfig
from dice_py.data import pairs_frame
from dice_py.errors import DataError
from dice_py.replay.appended import append_mined
from dice_py.replay.buffer import ReplayBuffer
from dice_py.scoring.pairs import score_pairs
from dice_py.stages.replay import ReplayJob
from dice_py.storage.parquet import parquet_meta, write_parquet

SIDES = ("chosen", "rejected")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    found = make_round(tmp_path / "round")
    del found["key"]
    return found


def label(files: dict[str, Any], **columns: Any) -> None:
    """Adds label columns to the mined pairs."""
    mined = pl.read_parquet(files["mined"]).with_columns(**columns)
    write_parquet(files["mined"], mined, key="labeled", meta={"alpha_per_token": 0.0125})


def offline(folder: Path) -> Path:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"offline {n}"}],
            "chosen": [{"role": "assistant", "content": "good" * (1 + n % 3)}],
            "rejected": [{"role": "assistant", "content": "bad"}],
        }
        for n in range(6)
    ]
    return write_parquet(folder / "offline.parquet", pairs_frame(rows), key="offline")


def run(policy: Path, out: Path, **fields: Any) -> pl.DataFrame:
    job = ReplayJob(
        ReplayConfig(gamma=0.5), ScoreConfig(), CPU, policy=policy, out=out, seed=0, input_keys="k", **fields
    )
    job.run()
    return pl.read_parquet(out / "training_set.parquet")


def scored(model: Path, pairs: pl.DataFrame, name: str = "ref", shared: bool = False) -> list[pl.Series]:
    logps = score_pairs(ScoreConfig(), CPU, policy=model, pairs=pairs, shared=shared)
    return [column.alias(f"{name}_{column.name}s") for column in logps.get_columns()]


def assert_logps(pairs: pl.DataFrame, model: Path, name: str, shared: bool = False) -> None:
    for expected in scored(model, pairs, name, shared):
        assert_series_equal(pairs[expected.name], expected, abs_tol=1e-4)


def test_labels_come_with_the_mined_pairs_and_the_buffer(llama: Path, tmp_path: Path, files: dict[str, Any]) -> None:
    earlier = make_round(tmp_path / "earlier", first=50)
    for one in (files, earlier):
        label(one, soft_label=pl.Series([0.9, 0.6]), difficulty=pl.Series(["easy", "hard"]))
    buffer = ReplayBuffer(tmp_path / "buffer", 10, 0)
    append_mined(buffer, 1, **earlier)
    config = ReplayConfig.model_validate({"gamma": 2 / 3, "buffer": {"share": 1.0}})
    job = ReplayJob(
        config, ScoreConfig(), CPU, policy=llama, out=tmp_path / "out", seed=0, input_keys="k", **files,
        offline=offline(tmp_path), rounds_buffer=buffer, round_number=2,
    )  # fmt: skip
    summary = job.run().counts
    found = pl.read_parquet(tmp_path / "out/training_set.parquet")
    by_source = {str(key[0]): part for key, part in found.partition_by("source", as_dict=True).items()}
    assert by_source["mined"]["soft_label"].to_list() == pytest.approx([0.9, 0.6])
    assert by_source["replay:rounds"]["soft_label"].to_list() == pytest.approx([0.9, 0.6])
    assert by_source["replay:rounds"]["difficulty"].to_list() == ["easy", "hard"]
    assert by_source["replay:rounds"]["margin"].to_list() == pytest.approx([0.4, 0.3])
    assert by_source["replay"]["soft_label"].null_count() == by_source["replay"]["margin"].null_count() == 2
    assert summary["mined_alpha"] == parquet_meta(tmp_path / "out/training_set.parquet")["mined_alpha"] == 0.0125


def test_labels_of_another_kind_are_refused(llama: Path, tmp_path: Path, files: dict[str, Any]) -> None:
    label(files, soft_label=pl.Series(["much", "little"]))
    with pytest.raises(DataError, match=r"a label that is none of mining's .*soft_label Float32"):
        run(llama, tmp_path / "out", **files, offline=offline(tmp_path))


def test_the_reference_of_the_scores(llama: Path, other: Path, tmp_path: Path, files: dict[str, Any]) -> None:
    """The reward's reference is the loss's: its log-probabilities are in the scores, the policy's are the start's."""
    found = run(
        llama, tmp_path / "out", **files, offline=offline(tmp_path), reference=other, reference_scores="ref_logp"
    )
    mined = found.filter(pl.col("source") == "mined")
    assert mined["start_chosen_logps"].to_list() == [-1.0, -11.0]
    assert mined["start_rejected_logps"].to_list() == [-2.0, -9.0]
    assert mined["ref_chosen_logps"].to_list() == mined["ref_rejected_logps"].to_list() == [-2.0, -2.0]
    replayed = found.filter(pl.col("source") == "replay")
    assert replayed.height == 2
    assert_logps(replayed, other, "ref")
    assert_logps(replayed, llama, "start")


def test_a_reference_that_no_scores_have(llama: Path, other: Path, tmp_path: Path, files: dict[str, Any]) -> None:
    found = run(llama, tmp_path / "out", **files, offline=offline(tmp_path), reference=other, reference_scores=None)
    assert found.filter(pl.col("source") == "mined")["start_chosen_logps"].to_list() == [-1.0, -11.0]
    assert_logps(found, other, "ref")
    assert_logps(found.filter(pl.col("source") == "replay"), llama, "start")


@pytest.mark.parametrize("with_reference", [False, True])
def test_sums_over_the_shared_length(
    llama: Path, other: Path, tmp_path: Path, files: dict[str, Any], with_reference: bool
) -> None:
    fields = {"reference": other, "reference_scores": "ref_logp"} if with_reference else {}
    found = run(llama, tmp_path / "out", **files, offline=offline(tmp_path), shared_logps=True, **fields)
    mined = found.filter(pl.col("source") == "mined")
    assert mined["ref_chosen_logps"].to_list() == ([-2.0, -2.0] if with_reference else [-1.0, -11.0])  # as scored
    model = other if with_reference else llama
    for expected in scored(model, found, shared=True)[2:]:
        assert_series_equal(found[expected.name], expected, abs_tol=1e-4)
    assert ("start_chosen_logps" in found.columns) is with_reference


def test_scores_of_a_shared_length(llama: Path) -> None:
    pairs = token_pairs(12)
    cut = pl.min_horizontal(pl.col("chosen_ids").list.len(), pl.col("rejected_ids").list.len())
    starts = pairs.with_columns(pl.col(f"{side}_ids").list.head(cut) for side in SIDES)
    assert (starts != pairs).sum_horizontal().sum()
    found = score_pairs(ScoreConfig(), CPU, policy=llama, pairs=pairs, shared=True)
    whole, start = (score_pairs(ScoreConfig(), CPU, policy=llama, pairs=each) for each in (pairs, starts))
    for side in SIDES:
        assert_series_equal(found[f"{side}_logp"], whole[f"{side}_logp"], abs_tol=1e-4)
        assert_series_equal(found[f"{side}_shared_logp"], start[f"{side}_logp"], abs_tol=1e-4, check_names=False)


def test_keys(llama: Path, other: Path, tmp_path: Path, files: dict[str, Any]) -> None:
    def key(**fields: Any) -> str:
        return ReplayJob(
            ReplayConfig(), ScoreConfig(), CPU, policy=llama, out=tmp_path, seed=0, input_keys="k", **files,
            offline=None, **fields,
        ).key()  # fmt: skip

    others = [{"reference": other, "reference_scores": name} for name in ("ref_logp", None)]
    assert len({key(), key(shared_logps=True), *(key(**fields) for fields in others)}) == 4
