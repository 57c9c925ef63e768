"""What runs in the workers of tests/compute. It imports little, so that they start fast."""

from __future__ import annotations

import ctypes
import importlib
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

from processes import PATIENCE

from dice_py.compute.allocator import keeps_freed_memory
from dice_py.compute.stage_process import run_in_subprocess
from dice_py.errors import DataError
from dice_py.events import Report
from dice_py.timing import timed

BLOCK = 96 * 2**20
"""Bytes of a block that `memory_settings` fills: more than any threshold of glibc that adapts itself."""


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


def memory_settings(*, report: Report) -> dict[str, Any]:
    """The allocator's variables in this process's environment, and the page faults of each of eight large blocks."""
    libc = ctypes.CDLL("libc.so.6")
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    faults = []
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = libc.malloc(BLOCK)
        ctypes.memset(block, 1, BLOCK)
        libc.free(block)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return {"set": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}, "faults": faults}


def keeps(*, report: Report) -> bool:
    return keeps_freed_memory(ctypes.CDLL(None))


def in_its_own_worker(log: str, *, report: Report) -> dict[str, Any]:
    """Runs `memory_settings` in a worker of this worker, and passes its events on."""
    report("note", text="of the outer worker")
    value: dict[str, Any] = run_in_subprocess(memory_settings, log=Path(log), remedy="", report=report)
    return value


def import_models(others: list[str], **_: Any) -> dict[str, bool]:
    """Imports the classes of a model: whether each of `others` came with them. All can be imported afterwards."""
    import transformers

    assert transformers.AutoModelForCausalLM.__name__ == "AutoModelForCausalLM"
    assert transformers.LlamaForCausalLM.__name__ == "LlamaForCausalLM"
    there = {name: name in sys.modules for name in others}
    for name in others:
        importlib.import_module(name)
    return there
