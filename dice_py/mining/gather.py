"""`attach_text`: the texts of mined pairs, gathered from the generations by row number.

Only the rows of pairs are read of files and LazyFrames: text of the other responses is never in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import polars as pl

from dice_py.errors import DataError

Generations: TypeAlias = pl.DataFrame | pl.LazyFrame | str | Path | Sequence[str | Path]


def attach_text(
    pairs: pl.DataFrame,
    generations: Generations,
    *,
    text_columns: Sequence[str] = ("response",),
    prompt_columns: Sequence[str] = (),
) -> pl.DataFrame:
    """The pairs, with columns of the responses that their row numbers name.

    `mined.pairs.pipe(attach_text, generations)`.

    Args:
        pairs: with `chosen_row` and `rejected_row`, row numbers of `generations` from zero.
        generations: what was mined, with its text: a frame, or Parquet files whose rows count through.
        text_columns: each becomes `chosen_NAME` and `rejected_NAME`; `response` becomes `chosen` and `rejected`, as TRL
            names them.
        prompt_columns: columns of the chosen response's row, added as they are.

    Returns:
        As many rows in the same order.

    Raises:
        DataError: a column is missing, a file cannot be read, or a row number is beyond the generations.
    """
    sides = ("chosen", "rejected")
    for side in sides:
        if f"{side}_row" not in pairs.columns:
            raise DataError(
                f"column '{side}_row' not found in the pairs; columns are {', '.join(pairs.columns)}: "
                "give the pairs of mine_pairs"
            )
    lazy, place = _open(generations)
    try:
        names = lazy.collect_schema().names()
        for name in (*text_columns, *prompt_columns):
            if name not in names:
                raise DataError(f"column '{name}' not found in {place}; columns are {', '.join(names)}")
        wanted = pl.concat([pairs[f"{side}_row"].cast(pl.UInt64) for side in sides]).unique().alias("row").to_frame()
        kept = list(dict.fromkeys([*text_columns, *prompt_columns]))
        # The row number must not meet a column of that name.
        number = "\0row"
        numbered = lazy.select(kept).with_row_index(number).with_columns(pl.col(number).cast(pl.UInt64))
        rows = numbered.join(wanted.lazy(), left_on=number, right_on="row", how="semi").collect()
        if rows.height < wanted.height:
            _refuse(wanted["row"], rows[number], lazy, place)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{place} cannot be read: {error}") from None
    found = pairs
    for side in sides:
        renamed = {name: side if name == "response" else f"{side}_{name}" for name in text_columns}
        shown = [pl.col(name).alias(new) for name, new in renamed.items()]
        if side == "chosen":
            shown += [pl.col(name) for name in prompt_columns]
        keys = pairs.select(pl.col(f"{side}_row").cast(pl.UInt64).alias(number))
        columns = keys.join(rows.select(number, *shown), on=number, how="left", maintain_order="left").drop(number)
        found = found.with_columns(columns)
    # Text of both sides first, then what belongs to the prompt.
    return found.select(pl.exclude(prompt_columns), *prompt_columns) if prompt_columns else found


def _open(generations: Generations) -> tuple[pl.LazyFrame, str]:
    if isinstance(generations, pl.LazyFrame):
        return generations, "the generations"
    if isinstance(generations, pl.DataFrame):
        return generations.lazy(), "the generations"
    files = [Path(generations)] if isinstance(generations, (str, Path)) else [Path(file) for file in generations]
    for file in files:
        if not file.is_file():
            raise DataError(f"{file} does not exist (or is not a file)")
    return pl.scan_parquet(files, glob=False), ", ".join(map(str, files[:3])) + (", …" if len(files) > 3 else "")


def _refuse(wanted: pl.Series, found: pl.Series, lazy: pl.LazyFrame, place: str) -> None:
    missing = wanted.filter(~wanted.is_in(found.implode())).sort()[0]
    rows = lazy.select(pl.len()).collect().item()
    raise DataError(
        f"the pairs name row {missing}, but {place} has {rows} rows: give the generations that were mined, whole and "
        "in the same order"
    )
