"""The options of single stages that training methods need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from tiny_round import make_round
from tiny_sets import scored_pairs

from dice_py.storage.parquet import write_parquet


def test_the_reference_of_the_loss_must_be_named(refused: Callable[..., str], llama: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    err = refused(
        2, "replay", "--policy", llama, "-o", tmp_path / "out", "--replay", pairs, "--set", "train.reference=initial"
    )
    assert "name that model with --reference" in err


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_a_label_that_the_training_set_lacks(refused: Callable[..., str], llama: Path, tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "set.parquet", scored_pairs(llama, 4), key="key")
    err = refused(3, "train", "--policy", llama, "--training-set", file, "-o", tmp_path / "out", "--method", "sppo")
    assert "no column 'chosen_win_rate', which train.method=sppo reads: mine with mine.win_rates=true" in err
    err = refused(2, "train", "--policy", llama, "--training-set", file, "-o", tmp_path / "out", "--method", "rdpo")
    assert "set train.length_weight to a number" in err


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_the_reward_of_an_earlier_policy(dice: Any, llama: Path, other: Path, tmp_path: Path) -> None:
    shard = make_round(tmp_path)["generations"][0]
    code, _, err = dice(
        "score", shard, "--policy", llama, "--reference", other, "--previous", llama, "-o", tmp_path / "out",
        "--set", "model.device=cpu",
    )  # fmt: skip
    assert code == 0, err
    scores = pl.read_parquet(tmp_path / "out/scores-00000.parquet")
    assert (scores["previous_reward"] - scores["reward"]).abs().max() < 1e-5
