"""Reads the rows of a user's JSONL, JSON or Parquet file, one after the other, each with its place in the file."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.errors import DataError
from dice_py.rows.file_kinds import check_file
from dice_py.storage.parquet import read_parquet


@dataclass(frozen=True)
class Row:
    """One row of a file. A line that is not a JSON object is a row too: `columns` raises the error."""

    where: str
    """The file and the line or row, as errors name it."""
    place: str
    """The same with the file's name alone, as artifacts keep it."""
    read: Callable[[], dict[str, Any]]

    @property
    def columns(self) -> dict[str, Any]:
        """The values by column.

        Raises:
            DataError: the line is not a JSON object.
        """
        return self.read()


def read_rows(path: Path) -> Iterator[Row]:
    """Yields the rows of a file.

    Raises:
        DataError: the file is absent, empty, of a kind that is not read, or cannot be read at all.
    """
    check_file(path)
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet_rows(path)
    else:
        # By content: a list is often named .jsonl, and one object a line .json.
        yield from _list_rows(path) if _is_list(path, suffix) else _jsonl_rows(path)


def _row(path: Path, place: str, read: Callable[[str], dict[str, Any]]) -> Row:
    where = f"{path}, {place}"
    return Row(where, f"{path.name}, {place}", lambda: read(where))


def _parquet_rows(path: Path) -> Iterator[Row]:
    rows = _with_python_times(read_parquet(path)).iter_rows(named=True)
    for index in itertools.count():
        try:
            row = next(rows, None)
        except (ValueError, OverflowError, pl.exceptions.PanicException) as error:
            raise DataError(
                f"{path} cannot be read: a time inside of a column ({error}); write it as text, or leave it out"
            ) from None
        if row is None:
            return
        # Parquet fills the fields that one row has and another lacks with nulls, at every depth.
        yield _row(path, f"row {index}", lambda _, row=row: {name: _without_nulls(row[name]) for name in row})  # type: ignore[misc]


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


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            text = line.strip()
            if text:
                yield _row(path, f"line {number}", lambda where, text=text: _object(_parse(text, where), where))  # type: ignore[misc]


def _list_rows(path: Path) -> Iterator[Row]:
    loaded = _parse(path.read_bytes(), str(path))
    if not isinstance(loaded, list):
        raise DataError(f"{path}: a .json file must hold one list of objects; one object per line is .jsonl")
    for index, item in enumerate(loaded):
        yield _row(path, f"item {index}", lambda where, item=item: _object(item, where))  # type: ignore[misc]


def _is_list(path: Path, suffix: str) -> bool:
    """Whether a file is to be read as one JSON value, and not line by line."""
    with path.open("rb") as lines:
        first = next((line for line in lines if line.strip()), b"").removeprefix(b"\xef\xbb\xbf").strip()
        is_only = not any(line.strip() for line in lines)
    if not first.startswith(b"{" if suffix == ".json" else b"["):
        return suffix == ".json"
    if is_only:
        return True
    try:
        of_a_row = dict if suffix == ".json" else list
        is_row = isinstance(_parse(first, str(path)), of_a_row)
    except DataError:
        is_row = False  # it goes on in the next line
    return not is_row


def _parse(data: bytes, where: str) -> Any:
    try:
        text = data.decode("utf-8-sig")  # "sig": some editors write a byte order mark
        value = _loads(text)
        # A lone surrogate is valid JSON, but not valid Unicode, so it could not be stored.
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start}); convert it") from None
    except UnicodeEncodeError:
        raise DataError(f"{where}: holds half of a surrogate pair, which is not valid text; fix or remove it") from None
    except _TwiceError as error:
        raise DataError(f"{where}: a JSON object has the key {str(error)!r:.80} twice; remove one of them") from None
    except json.JSONDecodeError as error:
        at = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        what = error.msg.removesuffix(" at")  # as some of Python's messages end
        raise DataError(f"{where}: not valid JSON ({what} at {at}); fix or remove it") from None
    except RecursionError:
        raise DataError(f"{where}: JSON nested too deeply; fix or remove it") from None
    return value


def _loads(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_fields)
    except (json.JSONDecodeError, _TwiceError):
        raise
    except ValueError:
        # An integer with more digits than Python converts. It is a number nevertheless: infinite, as a float.
        return json.loads(
            text,
            object_pairs_hook=_fields,
            parse_int=lambda digits: int(digits) if len(digits) < 640 else float(digits),
        )


class _TwiceError(ValueError):
    """A JSON object has a key twice; the argument is the key."""


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Of two values under one key, Python's own reader keeps the last without a word."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(next(name for name in names if names.count(name) > 1))
    return fields


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, not a {type(value).__name__}")
    return value
