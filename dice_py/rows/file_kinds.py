"""Which kind of file a user's data is in, and what to do about a kind that is not read."""

from __future__ import annotations

import re
from pathlib import Path

from dice_py.errors import DataError
from dice_py.rows.packed import PACKED_SUFFIXES, open_unpacked, packing

READ = ".jsonl, .json, .parquet, .csv or .tsv"
_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv")
_TO_PARQUET = {
    ".txt": 'write each text as a line {"prompt": "…"} of a .jsonl file',
    ".arrow": "write it as Parquet, for instance with Dataset.to_parquet of the package datasets",
    ".feather": "Polars reads it and writes Parquet: pl.read_ipc(…).write_parquet(…)",
}
# The first bytes of a file, and what it is.
_FORMATS = (
    (b"\x1f\x8b", "is compressed by gzip; unpack it first (gunzip)"),
    (b"\x28\xb5\x2f\xfd", "is compressed by zstd; unpack it first (unzstd)"),
    (b"BZh", "is compressed by bzip2; unpack it first (bunzip2)"),
    (b"\xfd7zXZ", "is compressed by xz; unpack it first (unxz)"),
    (b"PK\x03\x04", "is a ZIP archive; unpack it first (unzip)"),
    (b"ARROW1", "is an Arrow file; " + _TO_PARQUET[".arrow"]),
    (b"\xff\xff\xff\xff", "is an Arrow stream; " + _TO_PARQUET[".arrow"]),
    (b"\xff\xfe\x00\x00", "is UTF-32 text; convert it to UTF-8 (iconv -f UTF-32 -t UTF-8)"),
    (b"\xff\xfe", "is UTF-16 text; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)"),
    (b"\xfe\xff", "is UTF-16 text; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)"),
    (b"version https://git-lfs", "is a pointer of git-lfs, and not the file itself; get that with: git lfs pull"),
)
_PARQUET = b"PAR1"
_PAGE = re.compile(rb"\s*<(!doctype html|html)", re.IGNORECASE)
_URL = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)


def data_suffix(path: Path) -> str:
    """The end of a file's name that says what its rows are in, in lower case: ".jsonl" of rows.jsonl.gz."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in PACKED_SUFFIXES else suffix


def is_data_name(path: Path) -> bool:
    """Whether a file of this name holds rows of a kind that is read."""
    return data_suffix(path) in _SUFFIXES


def check_file(path: Path) -> None:
    """Refuses what is no file of rows of a kind that is read, from its place, its name and its first bytes.

    Raises:
        DataError: with what it is, and what to do.
    """
    if not path.is_file():
        raise DataError(_no_file(path))
    with open_unpacked(path) as file:
        first = file.read(64)
    if not first:
        raise DataError(f"{path} is empty")
    what = _format_of(first)
    if what is not None:
        raise DataError(f"{path} {what}")
    suffix = data_suffix(path)
    if suffix not in _SUFFIXES:
        remedy = f": {_TO_PARQUET[suffix]}" if suffix in _TO_PARQUET else ""
        raise DataError(f"{path}: unknown file type {suffix!r}; use {READ}{remedy}")
    if first.startswith(_PARQUET) and packing(path) is not None:
        raise DataError(f"{path} is a compressed Parquet file; unpack it first: Parquet compresses its own columns")
    if first.startswith(_PARQUET) != (suffix == ".parquet"):
        if suffix != ".parquet":
            raise DataError(f"{path} is a Parquet file; rename it to {path.stem}.parquet")
        if first.lstrip().startswith((b"{", b"[")):
            raise DataError(f"{path} holds JSON; rename it to {path.stem}.jsonl")


def other_format(path: Path) -> str | None:
    """What a file is, and what to do, where its first bytes are of a format that is not read; else None."""
    with path.open("rb") as file:
        return _format_of(file.read(64))


def _format_of(first: bytes) -> str | None:
    if _PAGE.match(first):
        return "is a web page (of a download that failed?); get the file itself"
    return next((what for magic, what in _FORMATS if first.startswith(magic)), None)


def is_url(text: str) -> bool:
    """Whether a path looks like a URL, of whose two slashes a `Path` has kept one."""
    return _URL.match(text) is not None


def _no_file(path: Path) -> str:
    """The sentence about a path that is no file."""
    try:
        is_folder, is_there = path.is_dir(), path.exists()
    except OSError:  # a name that is too long
        is_folder = is_there = False
    if is_folder:
        return f"{path} is a folder; give a file of {READ}"
    if is_there:
        return f"{path} is a pipe or a device, not a regular file; give a file"
    return f"{path} does not exist (or is not a file)"
