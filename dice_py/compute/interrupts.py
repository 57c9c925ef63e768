"""SIGTERM, which schedulers send, and SIGHUP, which a closed terminal sends, handled as Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_AGAIN = b"error: interrupted again: stopped at once; completed files are kept\n"
_EXIT_CODE = 5  # errors.InterruptedRunError


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Within the block the first signal raises KeyboardInterrupt, and a second one ends the process at once.

    A command that a scheduler ends then stops as with Ctrl-C: completed shards are kept, and the exit code is 5. The
    second signal is for a person who does not want to wait. Worker processes end when this one does. A signal that is
    ignored, as under nohup, stays ignored. Outside of the main thread, and inside of another such block, it changes
    nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in _SIGNALS}
    if any(isinstance(handler, _Handler) for handler in previous.values()):
        yield
        return
    handler = _Handler()
    try:
        for number, before in previous.items():
            if before is not signal.SIG_IGN:
                signal.signal(number, handler)
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


class _Handler:
    """Counts the signals of a block."""

    def __init__(self) -> None:
        self._interrupted = False

    def __call__(self, number: int, frame: object) -> None:
        if self._interrupted:
            # Neither print nor sys.exit: this may interrupt a write to stderr, or a finally that would go on waiting.
            with contextlib.suppress(OSError):
                os.write(2, _AGAIN)
            os._exit(_EXIT_CODE)
        self._interrupted = True
        raise KeyboardInterrupt
