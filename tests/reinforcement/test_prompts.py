"""Which prompts are hard: those of which every mined pair is."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from tiny_reinforcement import training_set

from dice_py.errors import DataError
from dice_py.reinforcement.prompts import Split, hard_prompts
from dice_py.storage.parquet import write_parquet


def test_a_prompt_with_an_easy_pair_is_easy(tmp_path: Path) -> None:
    rows = training_set(["hard", "hard", "easy", "hard"])
    again = rows[[0]].with_columns(difficulty=pl.lit("easy"))
    file = write_parquet(tmp_path / "set.parquet", pl.concat([rows, again]), key="k")
    hard, split = hard_prompts(file)
    assert split == Split(easy=2, hard=2, hard_pairs=2)
    assert hard.equals(rows[[1, 3]].select("prompt", "prompt_ids"))


def test_replayed_pairs_have_no_hard_prompts(tmp_path: Path) -> None:
    rows = training_set(["hard", "hard", None, "easy"], ["mined", "replay:rounds", "replay", "mined"])
    hard, split = hard_prompts(write_parquet(tmp_path / "set.parquet", rows, key="k"))
    assert split == Split(easy=1, hard=1, hard_pairs=1)
    assert hard.height == 1


def test_shares_of_none_and_all(tmp_path: Path) -> None:
    for difficulty, share in (("easy", 0.0), ("hard", 1.0)):
        _, split = hard_prompts(write_parquet(tmp_path / "set.parquet", training_set([difficulty] * 3), key="k"))
        assert split.hard_share == share


def test_a_training_set_without_labels_is_refused(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "set.parquet", training_set(["hard"]).drop("difficulty"), key="k")
    with pytest.raises(DataError, match=r"no column 'difficulty'; mine with mine\.difficulty_quantile"):
        hard_prompts(file)
