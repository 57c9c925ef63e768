"""The training set, as the trainer reads it: token ids and reference log-probabilities, never text."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from dice_py.errors import DataError
from dice_py.storage.parquet import read_parquet

COLUMNS = ["prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps"]
"""The columns that training reads."""


def load_training_set(path: Path, max_length: int | None) -> tuple[pl.DataFrame, int]:
    """Reads a training set and leaves longer pairs out.

    Args:
        path: a Parquet file with the schema `TRAINING_SET` (storage/schemas.py).
        max_length: tokens of a prompt and its longer response, inclusive; None: no limit.

    Returns:
        The pairs, with `COLUMNS`; and the number of pairs that are longer than `max_length`.

    Raises:
        DataError: a column is missing or has no token ids, no pair is left, or a reference log-probability is null or
            not finite.
    """
    frame = read_parquet(path, COLUMNS)
    for column, dtype in frame.schema.items():
        if column.endswith("_ids") and not (isinstance(dtype, pl.List) and dtype.inner.is_integer()):
            raise DataError(
                f"{path}: column {column!r} is {dtype}, not a list of token ids; train on a file of dice replay, since "
                "text is not tokenized here"
            )
    finite = pl.col("ref_chosen_logps").is_finite() & pl.col("ref_rejected_logps").is_finite()
    bad = frame.filter(~finite.fill_null(False))
    if bad.height:
        raise DataError(
            f"{path}: {bad.height} pairs have a reference log-probability that is not finite; score them "
            "again (dice score)"
        )
    if frame.is_empty():
        raise DataError(f"{path} has no pairs; the mine stage reports why it dropped prompts")
    kept = frame
    if max_length is not None:
        longer = pl.max_horizontal(pl.col("chosen_ids").list.len(), pl.col("rejected_ids").list.len())
        kept = frame.filter(pl.col("prompt_ids").list.len() + longer <= max_length)
    if kept.is_empty():
        raise DataError(f"{path}: none of its {frame.height} pairs fits into train.max_length ({max_length}); raise it")
    return kept, frame.height - kept.height
