"""A lock between processes on one file: exclusive, released by the kernel when the holder ends, however it ends.

It uses `flock` (Linux, macOS). The file alone means nothing: it stays after release, since removing it would let two
processes lock two files of one name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

_RETRY_SECONDS = 0.002  # more than enough for `is_locked` to finish


@contextlib.contextmanager
def exclusive_lock(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Holds the lock on `path`, which is created if absent; its folder must exist. The file then holds the pid.

    Threads of one process exclude one another too. Subprocesses do not inherit the lock; a child of `os.fork` shares
    it. With `wait` the call blocks until the lock is free.

    Raises:
        BlockingIOError: another process or thread holds the lock (only without `wait`).
        OSError: the file cannot be opened for writing.
    """
    # Opened without truncating: the file may hold the pid of the process that has the lock now.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        if wait:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        else:
            _lock_now(descriptor, path)
        with contextlib.suppress(OSError):  # the pid is only for a person who searches for the holder
            os.ftruncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        os.close(descriptor)


def _try(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock_now(descriptor: int, path: Path) -> None:
    """Takes the lock at once. Retries while processes only test the lock (`is_locked`); raises if one holds it."""
    while not _try(descriptor, fcntl.LOCK_EX):
        # Only an exclusive lock prevents a shared one, so this distinguishes a holder from a test.
        if not _try(descriptor, fcntl.LOCK_SH):
            raise BlockingIOError(errno.EWOULDBLOCK, "locked by another process", str(path))
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        time.sleep(_RETRY_SECONDS)


def is_locked(path: Path) -> bool:
    """True while a process holds `exclusive_lock(path)`. A process that is taking the lock is not disturbed.

    Nothing is written, so it works in folders that may only be read.

    Raises:
        OSError: the file exists but cannot be read.
    """
    try:
        with path.open("rb") as file:
            return not _try(file.fileno(), fcntl.LOCK_SH)
    except FileNotFoundError:
        return False
