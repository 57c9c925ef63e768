"""Digests of bytes: xxh3-128, which notices every flipped bit and reads as fast as the disk.

They guard against damage, not against a forger. Keys (storage/keys.py) are digests of what decides an artifact;
these are digests of what the artifact's file holds.

A file of this program carries the digest of its own bytes, near its end: in a Parquet footer, as the last member of a
JSON object, in the last line of a YAML file. It is taken with 32 zeros in its own place. So a file and its digest are
renamed, copied and moved as one, and no kill can separate them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import xxhash

DIGEST_NAME = "dice.digest"
"""The name before a file's digest of itself."""

NO_DIGEST = "0" * 32
"""Stands where the digest will be."""

FileState = Literal["absent", "unmarked", "damaged", "intact"]

_CHUNK = 4 * 2**20
_TAIL = 64 * 2**10  # behind the digest, a Parquet footer has the writer's name and three bytes for each column
# Between name and digest: two bytes of Thrift (type, length), or the punctuation of JSON or YAML.
_MARK = re.compile(re.escape(DIGEST_NAME.encode()) + rb'(?:\x18\x20|": "|: )([0-9a-f]{32})')


def bytes_digest(data: bytes) -> str:
    """32 hexadecimal digits of bytes in memory."""
    return xxhash.xxh3_128_hexdigest(data)


def content_digest(path: Path) -> str:
    """32 hexadecimal digits of a file's bytes, which are read once, in parts.

    Raises:
        OSError: the file is absent or cannot be read.
    """
    return _digest(path, None)


def embed_digest(path: Path) -> None:
    """Writes a file's digest of itself over the zeros that it has for it, and does not sync it to the disk.

    Raises:
        ValueError: the file has no place for it.
    """
    mark = _find_mark(path)
    if mark is None or mark[1] != NO_DIGEST:
        raise ValueError(f"{path} has no place for a digest of itself")
    offset = mark[0]
    digest = _digest(path, offset)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(digest.encode())


def stored_digest(path: Path) -> str | None:
    """A file's digest of itself, unchecked; None if it has none or cannot be read."""
    try:
        mark = _find_mark(path) if path.is_file() else None
    except OSError:
        return None
    return None if mark is None else mark[1]


def file_state(path: Path) -> FileState:
    """Reads a file and compares it with its digest of itself: "unmarked" if it carries none, "damaged" if it differs.

    Raises:
        OSError: the file is there and cannot be read.
    """
    if not path.is_file():
        return "absent"
    mark = _find_mark(path)
    if mark is None:
        return "unmarked"
    return "intact" if _digest(path, mark[0]) == mark[1] else "damaged"


def _find_mark(path: Path) -> tuple[int, str] | None:
    """The offset of a file's digest of itself, and the digest."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        start = max(0, size - _TAIL)
        file.seek(start)
        found = list(_MARK.finditer(file.read()))
    return (start + found[-1].start(1), found[-1][1].decode()) if found else None


def _digest(path: Path, zeros_at: int | None) -> str:
    """The digest of a file, with zeros in the place of its digest of itself."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        if zeros_at is not None:
            left = zeros_at
            while left and (chunk := file.read(min(_CHUNK, left))):
                state.update(chunk)
                left -= len(chunk)
            state.update(NO_DIGEST.encode())
            file.seek(zeros_at + len(NO_DIGEST))
        while chunk := file.read(_CHUNK):
            state.update(chunk)
    return state.hexdigest()
