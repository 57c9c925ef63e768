"""Measurements of this machine that later runs reuse: token budgets, throughput, start-up times.

One JSON file in the cache folder, by kind and key. A key names the model's shape, its dtype and the device, so that a
measurement is never used for another model or machine. Without the file, the measurements are repeated; nothing else
depends on it.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from dice_py.errors import DiskFullError, UsageError
from dice_py.storage.files import read_sealed, write_sealed
from dice_py.storage.lock import exclusive_lock


def cache_folder() -> Path:
    """`$DICE_CACHE`, else `dice` in the user's cache folder (`$XDG_CACHE_HOME`, else `~/.cache`).

    Raises:
        UsageError: none of these is set, and the user has no home folder.
    """
    explicit = os.environ.get("DICE_CACHE")
    if explicit:
        return Path(explicit)
    caches = os.environ.get("XDG_CACHE_HOME")
    if caches:
        return Path(caches) / "dice"
    try:
        return Path.home() / ".cache" / "dice"
    except RuntimeError:
        raise UsageError("there is no home folder to keep a cache in: set DICE_CACHE to a folder") from None


def _file() -> Path:
    return cache_folder() / "remembered.json"


def _read() -> dict[str, dict[str, Any]]:
    # Anything of another form was not written by this program, or is damaged.
    content = read_sealed(_file(), "remembered") or {}
    return {kind: values for kind, values in content.items() if isinstance(values, dict)}


def recall(kind: str, key: str) -> Any:
    """The value stored under kind and key, or None."""
    return _read().get(kind, {}).get(key)


def remember(kind: str, key: str, value: Any) -> None:
    """Stores `value` (JSON) under kind and key. Does nothing where the cache folder cannot be written."""
    with contextlib.suppress(OSError, DiskFullError, UsageError):
        cache_folder().mkdir(parents=True, exist_ok=True)
        with exclusive_lock(_file().with_suffix(".lock")):
            content = _read()
            if content.get(kind, {}).get(key) != value:
                content.setdefault(kind, {})[key] = value
                write_sealed(_file(), content, "remembered")
