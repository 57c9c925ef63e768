"""Which kind of file a user's data is in, and what to do about a kind that is not read."""

from __future__ import annotations

import re
from pathlib import Path

from dice_py.errors import DataError

_READ = ".jsonl, .json or .parquet"
_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
_TO_PARQUET = {
    ".csv": "Polars reads it and writes Parquet: pl.read_csv(…).write_parquet(…)",
    ".tsv": 'Polars reads it and writes Parquet: pl.read_csv(…, separator="\\t").write_parquet(…)',
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
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def check_file(path: Path) -> None:
    """Refuses what is no file of rows of a kind that is read, from its place, its name and its first bytes.

    Raises:
        DataError: with what it is, and what to do.
    """
    if not path.is_file():
        raise DataError(_no_file(path))
    first = _first_bytes(path)
    if not first:
        raise DataError(f"{path} is empty")
    what = other_format(path)
    if what is not None:
        raise DataError(f"{path} {what}")
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        remedy = f": {_TO_PARQUET[suffix]}" if suffix in _TO_PARQUET else ""
        raise DataError(f"{path}: unknown file type {suffix!r}; use {_READ}{remedy}")
    if first.startswith(_PARQUET) != (suffix == ".parquet"):
        if suffix != ".parquet":
            raise DataError(f"{path} is a Parquet file; rename it to {path.stem}.parquet")
        if first.lstrip().startswith((b"{", b"[")):
            raise DataError(f"{path} holds JSON; rename it to {path.stem}.jsonl")


def other_format(path: Path) -> str | None:
    """What a file is, and what to do, where its first bytes are of a format that is not read; else None."""
    first = _first_bytes(path)
    if _PAGE.match(first):
        return "is a web page (of a download that failed?); get the file itself"
    return next((what for magic, what in _FORMATS if first.startswith(magic)), None)


def is_url(text: str) -> bool:
    """Whether a path looks like a URL, of whose two slashes a `Path` has kept one."""
    return _URL.match(text) is not None


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(64)


def _no_file(path: Path) -> str:
    """The sentence about a path that is no file."""
    text = str(path)
    try:
        is_folder, is_there = path.is_dir(), path.exists()
    except OSError:  # a name that is too long
        is_folder = is_there = False
    if is_there and not is_folder:
        return f"{path} is a pipe or a device, not a regular file; give a file"
    if is_folder:
        saved = any((path / name).exists() for name in ("state.json", "dataset_dict.json"))
        remedy = f"; {_TO_PARQUET['.arrow']}" if saved else ""
        return f"{path} is a folder; give one file of {_READ}{remedy}"
    absent = f"{path} does not exist (or is not a file)"
    if is_url(text):
        return f"{absent}; it looks like a URL: get the file first, since only local files are read"
    if any(sign in text for sign in "*?["):
        return f"{absent}; patterns are not read here: give one file"
    if _HUB_ID.fullmatch(text) and path.suffix.lower() not in _SUFFIXES:
        return (
            f"{absent}; if it is the id of a data set of the Hugging Face hub, write that as a file first, with "
            "Dataset.to_parquet of the package datasets"
        )
    return absent
