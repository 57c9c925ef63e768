"""A process of its own for each model-holding stage, and the events that it sends back.

Spawned, never forked, so that its memory (and the GPU's) is gone when it ends. It ends with its parent: a
parent that was killed leaves no orphan behind that holds a GPU. What the libraries print goes to the stage's
`worker.log`; the parent shows only events:

    progress  stage, done, total, unit     how far a stage is
    note      text                         something a person should know (which engine, what was dropped)
    shard     file, key, counts…           a shard is whole, under its final name
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from dice_py.artefacts import DiskFullError, Report, is_disk_full, path_error
from dice_py.errors import DataError, DiceError, InterruptedRunError, OutOfMemoryError, UsageError

_ERRORS: dict[str, type[DiceError]] = {
    kind.__name__: kind
    for kind in (DiceError, UsageError, DataError, OutOfMemoryError, DiskFullError, InterruptedRunError)
}


def is_out_of_memory(error: BaseException | None) -> bool:
    """True for a MemoryError and for torch's out-of-memory errors, and for what was raised from one.

    torch is not imported for it: the names of its errors and the words of its CPU allocator tell.
    """
    while error is not None:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if kinds & {"MemoryError", "OutOfMemoryError"} or "DefaultCPUAllocator" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _failure(error: BaseException) -> dict[str, Any]:
    """How an exception crosses to the parent: its kind, exit code and sentence ("bug": the traceback)."""
    if isinstance(error, OSError):
        error = path_error(error) or error
    text = str(error).strip()
    if isinstance(error, DiceError):
        return {"kind": type(error).__name__, "exit_code": error.exit_code, "text": text}
    if isinstance(error, KeyboardInterrupt):
        return {"kind": "InterruptedRunError", "exit_code": 5, "text": "interrupted"}
    if is_disk_full(error):
        text = f"no room left on the disk ({text}); free some space, then `dice resume` the run"
        return {"kind": "DiskFullError", "exit_code": 5, "text": text}
    if is_out_of_memory(error):
        first = text.splitlines()[0] if text else type(error).__name__
        return {"kind": "OutOfMemoryError", "exit_code": 4, "text": first}
    return {"kind": "bug", "exit_code": 1, "text": "".join(traceback.format_exception(error))}


def _watch_parent(life: Connection) -> None:
    # The parent holds the other end and never writes: the read ends only when the parent does.
    with contextlib.suppress(EOFError, OSError):
        life.recv_bytes()
    os._exit(1)


def _resolve(work: str | Callable[..., Any]) -> Callable[..., Any]:
    if not isinstance(work, str):
        return work
    module, _, name = work.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def _print_to(log: Path) -> None:
    """Sends what this process and its libraries print, in whatever language, to the end of `log`."""
    with log.open("ab") as handle:
        os.dup2(handle.fileno(), 1)
        os.dup2(handle.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)
    faulthandler.enable()


def _main(
    work: str | Callable[..., Any], arguments: dict[str, Any], events: Connection, life: Connection, log: str
) -> None:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    threading.Thread(target=_watch_parent, args=(life,), daemon=True).start()
    lock = threading.Lock()

    def report(event: str, **fields: Any) -> None:
        with lock:
            events.send((event, fields))

    try:
        _print_to(Path(log))
        result = _resolve(work)(report=report, **arguments)
        report("result", value=result)
    except BaseException as error:
        report("failed", **_failure(error))
        if not isinstance(error, DiceError | KeyboardInterrupt):
            with contextlib.suppress(OSError):  # the log's own disk may be what is full
                traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    events.close()
    # Libraries leave threads and, vLLM, child processes behind; nothing of the result depends on them.
    # Their finalizers still run: a semaphore left to the resource tracker (tqdm's lock) makes it complain to the user.
    with contextlib.suppress(Exception):
        multiprocessing.util._run_finalizers(0)  # type: ignore[attr-defined]
    os._exit(0)


def _tail(log: Path, lines: int = 30) -> str:
    try:
        text = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return ""
    return "\n".join("    " + line for line in text[-lines:])


def run_stage(
    work: str | Callable[..., Any], arguments: dict[str, Any], *, log: Path, remedy: str, report: Report
) -> Any:
    """Calls `work(report=…, **arguments)` in a spawned process and returns what it returned.

    `work` is "module:function", which only the worker imports (so the parent never loads torch), or a
    function; `arguments` are pickled. `remedy` ends the sentence when memory ran out.

    Raises:
        DiceError: as raised by `work`; OutOfMemoryError (4) when torch or the kernel says so.
        RuntimeError: a bug, with the traceback of the worker.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    events, child_events = context.Pipe(duplex=False)
    child_life, life = context.Pipe(duplex=False)
    process = context.Process(target=_main, args=(work, arguments, child_events, child_life, str(log)))
    started = time.monotonic()
    process.start()
    child_events.close()
    child_life.close()
    outcome: tuple[str, dict[str, Any]] | None = None
    try:
        while outcome is None:
            # The pipe's end alone would not tell that the worker is gone: a process that it left behind (vLLM
            # starts some) may hold it open.
            if not events.poll(1.0):
                if process.is_alive() or events.poll():
                    continue
                break
            try:
                event, fields = events.recv()
            except (EOFError, OSError):
                break
            if event in ("result", "failed"):
                outcome = (event, fields)
            else:
                report(event, **fields)
        process.join()
    finally:
        if process.is_alive():
            process.terminate()
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        life.close()
        events.close()
    if outcome is None:
        after = f"after {time.monotonic() - started:.0f} s"
        if process.exitcode == -signal.SIGTERM:
            raise InterruptedRunError(f"the worker of this stage was told to stop (signal 15) {after}")
        if process.exitcode == -signal.SIGKILL:
            raise OutOfMemoryError(
                f"the worker of this stage was killed {after} (signal 9: the kernel's, when memory "
                f"runs out); {remedy}. Its log is {log}"
            )
        raise RuntimeError(
            f"the worker of this stage ended without a result (exit code {process.exitcode}) {after}; the "
            f"end of {log}:\n{_tail(log)}"
        )
    event, fields = outcome
    if event == "result":
        return fields["value"]
    if fields["kind"] == "OutOfMemoryError":
        raise OutOfMemoryError(f"out of memory: {fields['text']}; {remedy}. The log is {log}")
    if fields["kind"] == "bug":
        raise RuntimeError(f"a stage failed; its log is {log}\n{fields['text']}")
    error = _ERRORS.get(fields["kind"], DiceError)(fields["text"])
    error.exit_code = fields["exit_code"]
    raise error
