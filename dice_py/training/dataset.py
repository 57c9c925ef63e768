"""The training set, as the trainer reads it: token ids, log-probabilities and labels, never text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from dice_py.errors import DataError
from dice_py.models.token_ids import check_token_ids
from dice_py.storage.parquet import present, read_parquet
from dice_py.storage.schemas import START_LOGPS

COLUMNS = ["prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps"]
"""The columns that every training reads."""


def load_training_set(
    path: Path, max_length: int | None, vocabulary: int | None = None, *, further: Sequence[str] = ()
) -> tuple[pl.DataFrame, int]:
    """Reads a training set and leaves longer pairs out.

    Args:
        path: a Parquet file with the schema `TRAINING_SET` (storage/schemas.py).
        max_length: tokens of a prompt and its longer response, inclusive; None: no limit.
        vocabulary: number of token ids that the model knows; None: not checked.
        further: columns to read besides `COLUMNS`.

    Returns:
        The pairs, with `COLUMNS`, the columns `START_LOGPS` where the file has them, and `further`; and the number of
        pairs that are longer than `max_length`.

    Raises:
        DataError: a column is missing or has no token ids (of this vocabulary), no pair is left, or a log-probability
            is null, not finite, or no number.
    """
    start = present(path, *START_LOGPS) if path.is_file() else []
    frame = read_parquet(path, list(dict.fromkeys([*COLUMNS, *start, *further])))
    logps = [name for name in frame.columns if name.endswith("_logps")]
    for column, dtype in frame.schema.items():
        if column.endswith("_ids"):
            check_token_ids(frame, column, path, vocabulary)
        elif column in logps and not dtype.is_numeric():
            raise DataError(
                f"{path}: column {column!r} has dtype {dtype}, but must hold log-probabilities; train on a file of "
                "dice replay"
            )
    # Databases write decimals, of which Polars cannot say whether they are finite.
    frame = frame.cast({name: pl.Float64 for name, dtype in frame.schema.items() if dtype.is_decimal()})
    finite = pl.all_horizontal(pl.col(logps).is_finite())
    bad = ~frame.select(finite.fill_null(False)).to_series()
    if bad.any():
        raise DataError(
            f"{path}: {bad.sum()} pairs have a reference log-probability that is not finite, the first in row "
            f"{bad.arg_max()}; score them again (dice score)"
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
