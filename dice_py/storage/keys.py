"""Keys, seeds and digests.

An artifact's key is a digest of everything that decides its content, so a changed input or setting changes the key. A
seed depends only on what is sampled, not on how work is split over processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import stat
from functools import cache
from pathlib import Path
from typing import Any

from dice_py.errors import DataError


def digest(*parts: Any) -> str:
    """A key: the first 24 hexadecimal digits of the SHA-256 of the parts as canonical JSON."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def seed_for(*parts: int | str) -> int:
    """A seed below 2^63 from (run seed, round, prompt_id, sample_id, …), equal for any sharding and any retry."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


@cache
def versions(*packages: str) -> dict[str, str]:
    """Installed version of each of `packages` and of this one; packages that are not installed are left out."""
    installed = {}
    for name in ("dice-align", *packages):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


@cache
def _file_digest(path: str, *stat: int) -> str:
    del stat  # arguments only so that a changed file misses the cache of this process
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:24]


def file_digest(path: Path) -> str:
    """The first 24 hexadecimal digits of the SHA-256 of a file's bytes.

    Raises:
        DataError: the file is absent or cannot be read.
    """
    try:
        found = path.stat()
        # A FIFO would wait for a writer, and a device such as /dev/zero has no end.
        if not stat.S_ISREG(found.st_mode):
            raise DataError(f"{path} is a folder, a pipe or a device, not a regular file; give a file")
        # The time of the last change of the inode, which no program can set back as it can the time of modification.
        return _file_digest(str(path.resolve()), found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
