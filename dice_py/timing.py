"""Seconds of this process by named span, added up ("import": modules; "load": weights read and moved to the device)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

_seconds: dict[str, float] = {}


@contextlib.contextmanager
def timed(name: str) -> Iterator[None]:
    """Adds the duration of the block to the seconds of `name`, also if the block fails."""
    started = time.monotonic()
    try:
        yield
    finally:
        _seconds[name] = _seconds.get(name, 0.0) + time.monotonic() - started


def timed_seconds() -> dict[str, float]:
    """Seconds by name in this process so far."""
    return dict(_seconds)
