"""The hard prompts of a training set: those whose best pair is labelled hard."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from dice_py.errors import DataError
from dice_py.storage.parquet import present, read_parquet

_COLUMNS = ("prompt", "prompt_ids", "source", "difficulty")


@dataclass(frozen=True)
class Split:
    """How mining's labels split the prompts of the pairs that it mined this round."""

    easy: int
    """Prompts with at least one easy pair."""
    hard: int
    """All others: every pair of theirs is hard."""
    hard_pairs: int
    """Pairs of the hard prompts."""

    @property
    def hard_share(self) -> float:
        """Of the prompts, from 0 to 1; 0 without prompts."""
        return self.hard / (self.easy + self.hard) if self.hard else 0.0


def hard_prompts(training_set: Path) -> tuple[pl.DataFrame, Split]:
    """The prompts of which every mined pair is hard, in the order of the file.

    Returns:
        `prompt` (messages) and `prompt_ids` (token ids), each prompt once; and the counts of both kinds.

    Raises:
        DataError: the training set has no labels.
    """
    missing = set(_COLUMNS) - set(present(training_set, *_COLUMNS))
    if missing:
        raise DataError(
            f"{training_set}: no column {min(missing)!r}; mine with mine.difficulty_quantile, and make the training "
            "set with dice replay"
        )
    mined = read_parquet(training_set, list(_COLUMNS)).filter(pl.col("source") == "mined")
    by_prompt = mined.group_by("prompt_ids", maintain_order=True).agg(
        pl.col("prompt").first(),
        is_hard=(pl.col("difficulty").cast(pl.String) == "hard").fill_null(value=False).all(),
        pairs=pl.len(),
    )
    hard = by_prompt.filter("is_hard")
    split = Split(by_prompt.height - hard.height, hard.height, int(hard["pairs"].sum()))
    return hard.select("prompt", "prompt_ids"), split
