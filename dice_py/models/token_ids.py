"""Checks of columns of token ids, by file, column and row. Imports no torch."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from dice_py.errors import DataError

_MOST = 2**31
"""Token ids are stored as i32."""


def check_token_ids(frame: pl.DataFrame, column: str, place: Path | str, vocabulary: int | None = None) -> None:
    """Checks that a column has lists of token ids.

    Args:
        place: names the frame in errors.
        vocabulary: number of ids that the model knows; None: not checked.

    Raises:
        DataError: the column is absent or no list of integers, or a row has a null or an id below zero or out of range.
    """
    if column not in frame.columns:
        raise DataError(f"{place}: no column {column!r}; its columns are {', '.join(frame.columns)}")
    series = frame[column]
    if not (isinstance(series.dtype, pl.List) and isinstance(series.dtype.inner, pl.DataType)) or not (
        series.dtype.inner.is_integer()
    ):
        raise DataError(
            f"{place}: column {column!r} is {series.dtype}, not a list of token ids: the tokens are taken as they were "
            "sampled, and text is never tokenized here"
        )
    if series.null_count():
        row = series.is_null().arg_max()
        raise DataError(f"{place}: column {column!r} holds nulls, the first in row {row}; each row needs its token ids")
    ids = series.explode(empty_as_null=False)
    wide = ids.cast(pl.Int64, strict=False)  # null beyond 64 bits with a sign
    bad = (wide.is_null() | (wide < 0) | (wide >= (vocabulary or _MOST))).fill_null(True)
    if bad.any():
        at = int(bad.arg_max() or 0)
        row = int((series.list.len().cum_sum() <= at).sum())
        if ids[at] is None:
            raise DataError(f"{place}: column {column!r} holds nulls among the token ids of row {row}")
        limit = f"the model's vocabulary of {vocabulary}" if vocabulary else "the range of token ids"
        raise DataError(
            f"{place}: column {column!r} has the token id {ids[at]} in row {row}, which is outside {limit}: use the "
            "file that this model's tokenizer made"
        )
