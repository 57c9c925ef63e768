"""A lock between processes on one file: exclusive, released by the kernel when the holder ends, however it ends.

It uses `flock` (Linux, macOS). The file alone means nothing: it stays after release, since removing it would let two
processes lock two files of one name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from dice_py.errors import UsageError

_RETRY_SECONDS = 0.002  # more than enough for `is_locked` to finish


@contextlib.contextmanager
def exclusive_lock(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Holds the lock on `path`, which is created if absent; its folder must exist. The file then holds the pid.

    Threads of one process exclude one another too. Subprocesses do not inherit the lock; a child of `os.fork` shares
    it. With `wait` the call blocks until the lock is free.

    Raises:
        BlockingIOError: another process or thread holds the lock (only without `wait`).
        UsageError: the path is a link, or no file.
        OSError: the file cannot be opened for writing.
    """
    # Opened without truncating: the file may hold the pid of the process that has the lock now. A link is not
    # followed, since what it leads to would be overwritten.
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UsageError(f"{path} is a symbolic link, and a lock is a file of its own: remove it") from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UsageError(f"{path} is no file, and a lock is one: remove it")
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
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO):  # absent, or no file that could be a lock
            return False
        raise
    try:
        return not _try(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)
