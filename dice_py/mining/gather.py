"""`attach_text`: gathers the texts of mined pairs from the generations, by row number.

Files and LazyFrames are filtered to the rows of the pairs while they are read, so that the text of other responses is
never in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import polars as pl

from dice_py.errors import DataError

Generations: TypeAlias = pl.DataFrame | pl.LazyFrame | str | Path | Sequence[str | Path]

SIDES = ("chosen", "rejected")
ROW = "\0row"
"""The name of the row number while texts are gathered; no column of a user has it."""


def attach_text(
    pairs: pl.DataFrame,
    generations: Generations,
    *,
    text_columns: Sequence[str] = ("response",),
    prompt_columns: Sequence[str] = (),
) -> pl.DataFrame:
    """Adds to pairs the columns of the responses that their row numbers name.

    Args:
        pairs: columns `chosen_row` and `rejected_row` are integers: row numbers of `generations`, from zero.
        generations: the mined table, with its text: a frame, or Parquet files, whose rows count through in their order.
        text_columns: each becomes `chosen_NAME` and `rejected_NAME`; `response` becomes `chosen` and `rejected`, which
            are TRL's names.
        prompt_columns: columns added once, from the row of the chosen response.

    Returns:
        The pairs in the same order, with the new columns in the generations' own dtypes.

    Raises:
        DataError: a column is missing, a file cannot be read, or a row number is beyond the generations.

    Example:
        >>> import polars as pl
        >>> generations = pl.DataFrame({
        ...     "prompt": ["2 + 2?", "2 + 2?", "3 + 3?", "3 + 3?"],
        ...     "response": ["4", "5", "7", "6"],
        ... })
        >>> pairs = pl.DataFrame({"chosen_row": [0, 3], "rejected_row": [1, 2]})
        >>> attach_text(pairs, generations, prompt_columns=["prompt"])
        shape: (2, 5)
        ┌────────────┬──────────────┬────────┬──────────┬────────┐
        │ chosen_row ┆ rejected_row ┆ chosen ┆ rejected ┆ prompt │
        │ ---        ┆ ---          ┆ ---    ┆ ---      ┆ ---    │
        │ i64        ┆ i64          ┆ str    ┆ str      ┆ str    │
        ╞════════════╪══════════════╪════════╪══════════╪════════╡
        │ 0          ┆ 1            ┆ 4      ┆ 5        ┆ 2 + 2? │
        │ 3          ┆ 2            ┆ 6      ┆ 7        ┆ 3 + 3? │
        └────────────┴──────────────┴────────┴──────────┴────────┘
    """
    for side in SIDES:
        if f"{side}_row" not in pairs.columns:
            raise DataError(
                f"column '{side}_row' not found in the pairs; columns are {', '.join(pairs.columns)}: "
                "pass the pairs of mine_pairs"
            )
    rows = _read_rows(pairs, generations, list(dict.fromkeys([*text_columns, *prompt_columns])))
    attached = pairs
    for side in SIDES:
        renamed = {name: side if name == "response" else f"{side}_{name}" for name in text_columns}
        selected = [pl.col(name).alias(new) for name, new in renamed.items()]
        if side == "chosen":
            selected += [pl.col(name) for name in prompt_columns]
        keys = pairs.select(pl.col(f"{side}_row").cast(pl.UInt64).alias(ROW))
        columns = keys.join(rows.select(ROW, *selected), on=ROW, how="left", maintain_order="left").drop(ROW)
        attached = attached.with_columns(columns)
    # The texts of both sides come first, then the columns of the prompt.
    return attached.select(pl.exclude(prompt_columns), *prompt_columns) if prompt_columns else attached


def _read_rows(pairs: pl.DataFrame, generations: Generations, columns: list[str]) -> pl.DataFrame:
    """The rows that the pairs name, once each, with their row number."""
    lazy, source = _open(generations)
    try:
        names = lazy.collect_schema().names()
        for name in columns:
            if name not in names:
                raise DataError(f"column '{name}' not found in {source}; columns are {', '.join(names)}")
        wanted = pl.concat([pairs[f"{side}_row"].cast(pl.UInt64) for side in SIDES]).unique().alias(ROW).to_frame()
        numbered = lazy.select(columns).with_row_index(ROW).with_columns(pl.col(ROW).cast(pl.UInt64))
        rows = numbered.join(wanted.lazy(), on=ROW, how="semi").collect()
        if rows.height < wanted.height:
            raise _missing_row(wanted[ROW], rows[ROW], lazy, source)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{source} cannot be read: {error}") from None
    return rows


def _open(generations: Generations) -> tuple[pl.LazyFrame, str]:
    """The generations as a LazyFrame, and their name in errors."""
    if isinstance(generations, pl.LazyFrame):
        return generations, "the generations"
    if isinstance(generations, pl.DataFrame):
        return generations.lazy(), "the generations"
    files = [Path(generations)] if isinstance(generations, (str, Path)) else [Path(file) for file in generations]
    for file in files:
        if not file.is_file():
            raise DataError(f"{file} does not exist (or is not a file)")
    return pl.scan_parquet(files, glob=False), ", ".join(map(str, files[:3])) + (", …" if len(files) > 3 else "")


def _missing_row(wanted: pl.Series, present: pl.Series, lazy: pl.LazyFrame, source: str) -> DataError:
    first = wanted.filter(~wanted.is_in(present.implode())).sort()[0]
    rows = lazy.select(pl.len()).collect().item()
    return DataError(
        f"the pairs name row {first}, but {source} has {rows} rows: pass all the generations that were mined, "
        "in the same order"
    )
