"""Where a process's seconds go: named spans of this process, added up (`load`: weights read and placed)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

_seconds: dict[str, float] = {}


@contextlib.contextmanager
def timed(name: str) -> Iterator[None]:
    """Adds what the block takes, failed or not, to the seconds of `name`."""
    started = time.monotonic()
    try:
        yield
    finally:
        _seconds[name] = _seconds.get(name, 0.0) + time.monotonic() - started


def timed_seconds() -> dict[str, float]:
    """Seconds by name, so far, in this process."""
    return dict(_seconds)
