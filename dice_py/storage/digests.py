"""Digests of bytes: xxh3-128, which notices every flipped bit and reads as fast as the disk.

They guard against damage, not against a forger. Keys (storage/keys.py) are digests of what decides an artifact;
these are digests of what the artifact's file holds.
"""

from __future__ import annotations

from pathlib import Path

import xxhash

_CHUNK = 4 * 2**20


def bytes_digest(data: bytes) -> str:
    """32 hexadecimal digits of bytes in memory."""
    return xxhash.xxh3_128_hexdigest(data)


def content_digest(path: Path) -> str:
    """32 hexadecimal digits of a file's bytes, which are read once, in parts.

    Raises:
        OSError: the file is absent or cannot be read.
    """
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
    return state.hexdigest()
