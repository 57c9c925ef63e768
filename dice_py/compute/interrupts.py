"""SIGTERM, which schedulers send, handled as Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Raises KeyboardInterrupt on SIGTERM inside the block. Only for the main thread.

    A run that a scheduler ends then stops as with Ctrl-C: completed shards are kept, and the exit code is 5.
    """

    def handler(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
