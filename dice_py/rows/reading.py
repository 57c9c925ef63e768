"""Reads the rows of a user's JSONL, JSON, Parquet or CSV file, one after the other, each with its place in the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dice_py.errors import DataError
from dice_py.rows.file_kinds import check_file, data_suffix
from dice_py.rows.packed import open_unpacked
from dice_py.rows.row import Origin, Row
from dice_py.rows.tables import csv_rows, parquet_rows


def file_rows(path: Path, short: str | None = None) -> Iterator[Row]:
    """Yields the rows of a file, one after the other. A list of JSON and a batch of Parquet are in memory as a whole.

    Args:
        path: the file.
        short: what artifacts call it; None: its name.

    Raises:
        DataError: the file is absent, empty, of a kind that is not read, or cannot be read at all.
    """
    check_file(path)
    origin, suffix = Origin(str(path), short or path.name), data_suffix(path)
    if suffix == ".parquet":
        yield from parquet_rows(path, origin)
    elif suffix in (".csv", ".tsv"):
        yield from csv_rows(path, origin, "\t" if suffix == ".tsv" else ",")
    else:
        # By content: a list is often named .jsonl, and one object a line .json.
        yield from _list_rows(path, origin) if _is_list(path, suffix) else _jsonl_rows(path, origin)


def _jsonl_rows(path: Path, origin: Origin) -> Iterator[Row]:
    with open_unpacked(path) as lines:
        for number, line in enumerate(lines, start=1):
            text = line.strip()
            if text:
                yield origin.row(f"line {number}", lambda where, text=text: _object(_parse(text, where), where))  # type: ignore[misc]


def _list_rows(path: Path, origin: Origin) -> Iterator[Row]:
    with open_unpacked(path) as file:
        data = file.read()
    loaded = _parse(data, str(path))
    del data
    if not isinstance(loaded, list):
        raise DataError(f"{path}: a .json file must hold one list of objects; one object per line is .jsonl")
    for index, item in enumerate(loaded):
        yield origin.row(f"item {index}", lambda where, item=item: _object(item, where))  # type: ignore[misc]


def _is_list(path: Path, suffix: str) -> bool:
    """Whether a file is to be read as one JSON value, and not line by line."""
    with open_unpacked(path) as lines:
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
