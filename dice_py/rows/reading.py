"""Reads the rows of a user's JSONL, JSON or Parquet file, one after the other, each with its place in the file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.errors import DataError


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
        DataError: the file is absent, empty, of an unknown type, or cannot be read at all.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist (or is not a file)")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet_rows(path)
    elif suffix in (".jsonl", ".ndjson"):
        yield from _jsonl_rows(path)
    elif suffix == ".json":
        yield from _json_rows(path)
    else:
        raise DataError(f"{path}: unknown file type {suffix!r}; use .jsonl, .json or .parquet")


def _row(path: Path, place: str, read: Callable[[str], dict[str, Any]]) -> Row:
    where = f"{path}, {place}"
    return Row(where, f"{path.name}, {place}", lambda: read(where))


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        frame = pl.read_parquet(path, glob=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {str(error).strip()}") from None
    for index, row in enumerate(frame.iter_rows(named=True)):
        # Parquet fills the fields that one row has and another lacks with nulls, at every depth.
        yield _row(path, f"row {index}", lambda _, row=row: {name: _without_nulls(row[name]) for name in row})  # type: ignore[misc]


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


def _json_rows(path: Path) -> Iterator[Row]:
    """The items of one list; or, as many published sets are, one object a line under the name .json."""
    if _begins_with_an_object(path):
        yield from _jsonl_rows(path)
        return
    loaded = _parse(path.read_bytes(), str(path))
    if not isinstance(loaded, list):
        raise DataError(f"{path}: a .json file must hold one list of objects; one object per line is .jsonl")
    for index, item in enumerate(loaded):
        yield _row(path, f"item {index}", lambda where, item=item: _object(item, where))  # type: ignore[misc]


def _begins_with_an_object(path: Path) -> bool:
    """True where the first line that is not blank is a JSON object, and others follow it."""
    with path.open("rb") as lines:
        first = next((line for line in lines if line.strip()), b"").removeprefix(b"\xef\xbb\xbf").strip()
        if not first.startswith(b"{") or not any(line.strip() for line in lines):
            return False
    try:
        return isinstance(_parse(first, str(path)), dict)
    except DataError:
        return False


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
    except json.JSONDecodeError as error:
        at = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise DataError(f"{where}: not valid JSON ({error.msg} at {at}); fix or remove it") from None
    except RecursionError:
        raise DataError(f"{where}: JSON nested too deeply; fix or remove it") from None
    return value


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:
        # An integer with more digits than Python converts. It is a number nevertheless: infinite, as a float.
        return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 640 else float(digits))


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, not a {type(value).__name__}")
    return value
