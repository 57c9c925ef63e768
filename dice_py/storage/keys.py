"""Keys, seeds and digests: what identifies an artifact, and which random numbers it is drawn with."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
from functools import cache
from pathlib import Path
from typing import Any

from dice_py.errors import DataError


def digest(*parts: Any) -> str:
    """A key: SHA-256 over the parts as canonical JSON, 24 hexadecimal digits of it."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def seed_for(*parts: int | str) -> int:
    """A seed below 2^63 from (run seed, round, prompt_id, sample_id, …): any layout, any retry, one seed."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


@cache
def versions(*packages: str) -> dict[str, str]:
    """Installed versions of `packages`, ours always among them; absent ones are left out."""
    found = {}
    for name in ("dice-align", *packages):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@cache
def _file_digest(path: str, size: int, mtime_ns: int) -> str:
    del size, mtime_ns  # a changed file must not meet the old entry of the cache
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:24]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, 24 digits of it.

    Raises:
        DataError: absent or unreadable.
    """
    try:
        stat = path.stat()
        return _file_digest(str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
