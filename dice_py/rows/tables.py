"""The rows of tables: Parquet, batch by batch, and CSV."""

from __future__ import annotations

import csv
import io
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.errors import DataError
from dice_py.rows.packed import open_unpacked
from dice_py.rows.row import Cell, Origin, Row
from dice_py.storage.parquet import parquet_batches


def parquet_rows(path: Path, origin: Origin) -> Iterator[Row]:
    """The rows of a Parquet file, whose batches are in memory one at a time.

    Raises:
        DataError: the file cannot be read.
    """
    count = itertools.count()
    for frame in parquet_batches(path):
        rows = _with_python_times(frame).iter_rows(named=True)
        while True:
            try:
                row = next(rows, None)
            except (ValueError, OverflowError, pl.exceptions.PanicException) as error:
                raise DataError(
                    f"{origin.full} cannot be read: a time inside of a column ({error}); write it as text, or leave "
                    "it out"
                ) from None
            if row is None:
                break
            yield table_row(row, origin, next(count))


def table_row(row: dict[str, Any], origin: Origin, index: int) -> Row:
    """A row of a table. Arrow fills the fields that one row has and another lacks with nulls, at every depth."""
    return origin.row(f"row {index}", lambda _: {name: _without_nulls(row[name]) for name in row})


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _with_python_times(frame: pl.DataFrame) -> pl.DataFrame:
    """The rows, without dates and times that Python's types cannot hold (the year 148108): such columns are not read.

    One that is read is refused as any other date is, since no column of the data is one.
    """
    day, years = 86_400, (-62_135_510_400, 253_402_214_400)  # seconds of the years 1 and 9999, in any time zone
    held = []
    for name, dtype in frame.schema.items():
        if dtype == pl.Date:
            least, most = years[0] // day, years[1] // day
        elif isinstance(dtype, pl.Datetime | pl.Duration):
            per_second = {"ms": 10**3, "us": 10**6, "ns": 10**9}[dtype.time_unit]
            seconds = years if isinstance(dtype, pl.Datetime) else (-day * 10**8, day * 10**8)
            least, most = max(-(2**63), seconds[0] * per_second), min(2**63 - 1, seconds[1] * per_second)
        else:
            continue
        column = frame[name]
        held.append(pl.when(column.to_physical().is_between(least, most)).then(column).alias(name))
    return frame.with_columns(held)


def csv_rows(path: Path, origin: Origin, delimiter: str) -> Iterator[Row]:
    """The rows of a CSV file with a header, every cell as text (`Cell`). A row is named by the line that it begins in.

    Raises:
        DataError: the header names a column twice, or quotes are not closed.
    """
    csv.field_size_limit(sys.maxsize)  # Python's limit of 131,072 characters is below a long response
    with open_unpacked(path) as stream:
        # Bytes that are no UTF-8 become surrogates here, so that they are an error of their row alone.
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        lines = csv.reader(text, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            line = lines.line_num + 1
            try:
                cells = next(lines, None)
            except csv.Error as error:
                raise DataError(
                    f"{origin.full}, line {line}: not valid CSV ({error}) in the row that begins here; a cell with a "
                    'quote, a line end or the separator is written in quotes, and a quote in it as ""'
                ) from None
            if cells is None:
                return
            if not cells:
                continue
            if header is None:
                header = _header(cells, origin)
                continue
            yield origin.row(f"line {line}", lambda where, cells=cells, names=header: _cells(names, cells, where))  # type: ignore[misc]


def _header(names: list[str], origin: Origin) -> list[str]:
    names = [name.strip() for name in names]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{origin.full}: the header has the column {twice!r:.80} twice; remove one of them")
    return names


def _cells(names: list[str], cells: list[str], where: str) -> dict[str, Any]:
    if len(cells) != len(names):
        raise DataError(
            f"{where}: has {len(cells)} cells, but the header has {len(names)} columns ({', '.join(names):.200})"
        )
    for name, cell in zip(names, cells, strict=True):
        try:
            cell.encode()
        except UnicodeEncodeError:
            raise DataError(f"{where}: {name!r} is not UTF-8 text; convert the file") from None
    return {name: Cell(cell) for name, cell in zip(names, cells, strict=True)}
