"""Ctrl-C, SIGTERM (which schedulers send) and SIGHUP (a terminal that was closed), handled alike in every command.

The first signal raises KeyboardInterrupt: completed shards are kept, workers are ended, and the exit code is 5. A
second one ends the process at once, in a sentence. Workers then notice that their parent is gone (compute/worker.py),
and a resume removes what was half written.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_EXIT_CODE = 5  # of InterruptedRunError
_SHOW_CURSOR = b"\x1b[?25h"  # a progress bar hides it
_AGAIN = b"error: interrupted again: stopped at once; completed files are kept, repeat the command to continue\n"


class _Interrupts:
    """Whether signals are handled, whether one has come, and whether the program's exit code is settled."""

    active = False
    received = False
    settled = False


def _handler(number: int, frame: FrameType | None) -> None:
    del number, frame
    if not _Interrupts.received:
        _Interrupts.received = True
        raise KeyboardInterrupt
    # Not sys.exit: clean-up is under way, may take long, and would be in the way. os.write may be called in a handler.
    with contextlib.suppress(OSError):
        os.write(2, (b"\r" + _SHOW_CURSOR if os.isatty(2) else b"") + _AGAIN)
    os._exit(_EXIT_CODE)


@atexit.register
def _ignore_late_signals() -> None:
    """At the very end Python puts the system's own handlers back, and another signal would change the exit code.

    It is registered before the handlers that end processes, and so is called after them.
    """
    if _Interrupts.received or _Interrupts.settled:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def settle(code: int) -> None:
    """A signal from here on ends the process at once, with its exit code: its work is done, and its results are told.

    To be called in the main thread. After a signal that stopped the work, the second one is handled as before.
    """
    if _Interrupts.received:
        return
    _Interrupts.settled = True
    for number in _SIGNALS:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            signal.signal(number, lambda *_: os._exit(code))


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Handles signals as above inside the block, once for all blocks inside each other.

    A signal that is ignored stays ignored, as under nohup. Outside the main thread, which alone may handle signals, it
    does nothing. After a signal has come, its handler stays: the end of the program can be interrupted too. So do those
    of `settle`.
    """
    if _Interrupts.active or threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {}
    for number in _SIGNALS:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            previous[number] = signal.signal(number, _handler)
    _Interrupts.active, _Interrupts.received = True, False
    try:
        yield
    finally:
        _Interrupts.active = False
        if not _Interrupts.received and not _Interrupts.settled:
            for number, handler in previous.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def children_ignore_interrupts() -> Iterator[None]:
    """Processes that are started inside the block begin with SIGINT and SIGHUP held back (`ignore_interrupts`).

    A terminal sends both to all of its processes. Only the parent answers: it ends its workers, which would otherwise
    print a traceback each. What comes meanwhile reaches the parent after the block.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals go to the main thread, whose mask is not ours to change
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_interrupts() -> None:
    """In a worker: ignores SIGINT and SIGHUP, for its own children too, and lets them through again."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGHUP})
