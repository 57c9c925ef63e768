"""What was measured on this machine and is worth knowing again: token budgets, throughput, start-up times.

One JSON file in the cache folder, by kind and key. A key names the model's shape, its type and the device, so that
nothing measured elsewhere is taken for here. Losing the file costs a little time, and nothing else.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dice_py.errors import DiskFullError
from dice_py.storage.files import write_json


def cache_folder() -> Path:
    """`$DICE_CACHE`, else `dice` in the user's cache folder."""
    given = os.environ.get("DICE_CACHE")
    if given:
        return Path(given)
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "dice"


def _file() -> Path:
    return cache_folder() / "remembered.json"


def _read() -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    # Whatever else stands there was not written by this program.
    return {kind: kept for kind, kept in found.items() if isinstance(kept, dict)} if isinstance(found, dict) else {}


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    _file().parent.mkdir(parents=True, exist_ok=True)
    with _file().with_suffix(".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def recall(kind: str, key: str) -> Any:
    """What was remembered, or None."""
    return _read().get(kind, {}).get(key)


def remember(kind: str, key: str, value: Any) -> None:
    """Keeps `value` (JSON) under kind and key; where the cache folder cannot be written, nothing is kept."""
    with contextlib.suppress(OSError, DiskFullError), _locked():
        found = _read()
        if found.get(kind, {}).get(key) != value:
            found.setdefault(kind, {})[key] = value
            write_json(_file(), found)
