"""Ctrl-C, SIGHUP (a terminal that was closed), and SIGTERM and SIGUSR1, which schedulers send ahead of a preemption.

The first signal raises KeyboardInterrupt: completed shards are kept, workers are ended, and the exit code is 5. A
second one ends the process at once, in a sentence. Workers then notice that their parent is gone (compute/worker.py),
and a resume removes what was half written.

Work that can stop at a good place by itself, as a training at the end of a step, is asked to by SIGTERM and SIGUSR1
(`asked_by_signals`). It has a limited time for it. When that is over, or another signal comes, the work is ended as
above.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_AHEAD = (signal.SIGTERM, signal.SIGUSR1)  # of a preemption
_OF_THE_PARENT = {signal.SIGINT, signal.SIGHUP, signal.SIGUSR1}
"""Signals that a terminal or a scheduler sends to all processes, and that only the parent answers."""
_EXIT_CODE = 5  # of InterruptedRunError
_SHOW_CURSOR = b"\x1b[?25h"  # a progress bar hides it
_AGAIN = b"error: interrupted again: stopped at once; completed files are kept, repeat the command to continue\n"


class _Interrupts:
    """Whether signals are handled, whether one has come, and whether the program's exit code is settled."""

    active = False
    received = False
    settled = False
    grace: float | None = None  # seconds in which the work under way can stop by itself
    asked = False


def _handler(number: int, frame: FrameType | None) -> None:
    del frame
    if number in _AHEAD and _Interrupts.grace is not None and not (_Interrupts.asked or _Interrupts.received):
        _Interrupts.asked = True
        signal.setitimer(signal.ITIMER_REAL, _Interrupts.grace)
        return
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
    _Interrupts.active, _Interrupts.received, _Interrupts.asked = True, False, False
    try:
        yield
    finally:
        _Interrupts.active = False
        if not _Interrupts.received and not _Interrupts.settled:
            for number, handler in previous.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def asked_by_signals(grace: float) -> Iterator[Callable[[], bool]]:
    """Inside the block, the first SIGTERM or SIGUSR1 does not interrupt; the function that it yields then returns True.

    The caller asks the work to stop, and waits for it. After the block KeyboardInterrupt is raised if a signal came
    and the work has ended in another way than with an error. Outside `stopped_by_signals`, and outside the main thread,
    it does nothing.

    Args:
        grace: seconds after the signal; KeyboardInterrupt then interrupts the block.
    """
    if not _Interrupts.active or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGALRM, _handler)
    _Interrupts.grace = max(grace, 0.001)  # 0 would never end
    try:
        yield lambda: _Interrupts.asked
    finally:
        _Interrupts.grace = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        _Interrupts.received |= _Interrupts.asked
    if _Interrupts.asked:
        raise KeyboardInterrupt


@contextlib.contextmanager
def children_ignore_interrupts() -> Iterator[None]:
    """Processes that are started inside the block begin with some signals held back (`ignore_interrupts`).

    A terminal sends SIGINT and SIGHUP to all of its processes, and Slurm SIGUSR1 to all of a step. Only the parent
    answers: it ends its workers, which would otherwise print a traceback each. What comes meanwhile reaches the parent
    after the block.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals go to the main thread, whose mask is not ours to change
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_PARENT)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_interrupts() -> None:
    """In a worker: ignores the signals that only its parent answers, for its own children too."""
    for number in _OF_THE_PARENT:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _OF_THE_PARENT)
