"""What runs in the workers of tests/compute. It imports little, so that they start fast."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path
from typing import Any

from processes import PATIENCE

from dice_py.errors import DataError
from dice_py.events import Report
from dice_py.timing import timed


class OfAStageError(DataError):
    """A kind of error that the parent does not know."""


def add(left: int, right: int, *, report: Report) -> dict[str, Any]:
    print("printed by the stage")
    os.write(2, b"written by a library\n")
    report("note", text="adding")
    for done in (1, 2):
        report("progress", stage="add", done=done, total=2, unit="numbers")
    return {"sum": left + right, "pid": os.getpid(), "path": Path("x")}


def fail(error: BaseException, *, report: Report) -> None:
    raise error


def end(how: str, *, report: Report) -> None:
    print("the last words", flush=True)
    if how == "exit":
        os._exit(3)
    if how == "segfault":
        ctypes.string_at(0)
    os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGTERM)
    time.sleep(PATIENCE)


def leave_a_child(pid_file: str, *, report: Report) -> None:
    """Ends without a result, while a process that it forked lives on and holds all its pipes."""
    child = os.fork()
    if child == 0:
        time.sleep(10 * PATIENCE)
        os._exit(0)
    Path(pid_file).write_text(str(child))
    os._exit(3)


def wait_long(pid_file: str, *, report: Report) -> None:
    Path(pid_file).write_text(str(os.getpid()))
    report("note", text="waiting")
    time.sleep(10 * PATIENCE)


def take_time(loading: float, working: float, error: BaseException | None = None, *, report: Report) -> None:
    with timed("load"):
        time.sleep(loading)
    time.sleep(working)
    if error is not None:
        raise error


def unpicklable(*, report: Report) -> Any:
    return lambda: None
