"""Rows looked up by key: every key is found, once, or the error names it. A left join would give nulls instead."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from dice_py.errors import DataError
from dice_py.storage.parquet import parquet_key, parquet_meta, parquet_rows


def look_up(keys: pl.DataFrame, table: pl.DataFrame, on: str, *, who: str, where: str) -> pl.DataFrame:
    """The columns of `table` beside `keys`, in the order of `keys`.

    Args:
        keys: has the column `on`, and further columns.
        table: has the column `on`, in which every value of `keys` stands once.
        who: names the keys in errors, as "the mined pairs".
        where: names the table, as the path of its file.

    Raises:
        DataError: a key is null, not in the table, or in it twice.
    """
    if keys[on].null_count():
        raise DataError(f"{who}: {on} is null in row {keys[on].is_null().arg_max()}")
    table = table.filter(pl.col(on).is_in(keys[on].unique().implode()))
    if table[on].is_duplicated().any():
        twice = table[on].filter(table[on].is_duplicated())[0]
        raise DataError(f"{where} has {on} {twice} more than once: it must be there once")
    missing = keys.select(on).unique().join(table.select(on), on=on, how="anti")[on].sort()
    if len(missing):
        more = f" (nor {len(missing) - 1} others)" if len(missing) > 1 else ""
        raise DataError(
            f"{who} name {on} {missing[0]}, which {where} does not have{more}: give all files that they were made "
            "from, in the same order"
        )
    return keys.join(table, on=on, how="left", maintain_order="left")


def check_row_aligned(generations: list[Path], scores: list[Path]) -> None:
    """Checks that each file of scores is that of the file of generations at its place.

    Raises:
        DataError: other numbers of files or of rows, or scores that were made from another file.
    """
    if len(generations) != len(scores):
        responses, results = (sum(map(parquet_rows, files)) for files in (generations, scores))
        raise DataError(
            f"{generations[0].parent} has {responses} responses, but {scores[0].parent} has {results} scores: they are "
            f"not of one round ({len(generations)} files of generations, {len(scores)} of scores); score these "
            "generations"
        )
    for generated, its_scores in zip(generations, scores, strict=True):
        rows, count = parquet_rows(generated), parquet_rows(its_scores)
        if rows != count:
            raise DataError(
                f"{generated} has {rows} responses, but {its_scores} has {count} scores: they do not belong together; "
                "score these generations, or give both in the same order"
            )
        meta = parquet_meta(its_scores)
        made_from = meta.get("generations_key") if isinstance(meta, dict) else None
        key = parquet_key(generated)
        if made_from is not None and key is not None and made_from != key:
            raise DataError(
                f"{its_scores} has the scores of another file than {generated}: score these generations, or give both "
                "in the same order"
            )
