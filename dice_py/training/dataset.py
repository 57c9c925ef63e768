"""The training set as the trainer reads it."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from dice_py.errors import DataError
from dice_py.storage.parquet import read_parquet

COLUMNS = ["prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps"]
"""What training reads of a training set."""


def load_training_set(path: Path, max_length: int | None) -> tuple[pl.DataFrame, int]:
    """The columns that training needs, and how many pairs were left out as longer than `max_length` tokens.

    Raises:
        DataError: a column is missing or holds no token ids, no pair is left, or a reference log-probability is
            null or not finite.
    """
    frame = read_parquet(path, COLUMNS)
    for column, dtype in frame.schema.items():
        if column.endswith("_ids") and not (isinstance(dtype, pl.List) and dtype.inner.is_integer()):
            raise DataError(
                f"{path}: column {column!r} is {dtype}, not a list of token ids; text is never tokenised here"
            )
    finite = pl.col("ref_chosen_logps").is_finite() & pl.col("ref_rejected_logps").is_finite()
    bad = frame.filter(~finite.fill_null(False))
    if bad.height:
        raise DataError(f"{path}: {bad.height} pairs have a reference log-probability that is not finite")
    kept = frame
    if max_length is not None:
        longer = pl.max_horizontal(pl.col("chosen_ids").list.len(), pl.col("rejected_ids").list.len())
        kept = frame.filter(pl.col("prompt_ids").list.len() + longer <= max_length)
    if kept.is_empty():
        raise DataError(f"{path}: none of its {frame.height} pairs can be trained on; is train.max_length too small?")
    return kept, frame.height - kept.height
