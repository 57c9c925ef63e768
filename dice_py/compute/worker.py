"""A spawned process that does one piece of work: the code that runs in it, and `Worker`, its parent's handle to it.

The process of a stage (compute/stage_process.py) and that of a group of devices (compute/process_pool.py) are both
workers. A worker is spawned, never forked, so that its memory, and the GPU's, is freed when it ends. It ends with its
parent: a parent that is killed leaves no orphan that holds a GPU.

This module imports nothing heavy, since every process imports it first. Polars and torch come with the work.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import importlib
import multiprocessing
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import pickle
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dice_py.compute.allocator import check_allocator, worker_environment
from dice_py.compute.devices import cuda_unstarted
from dice_py.compute.failures import Failure, failure_fields
from dice_py.compute.interrupts import children_ignore_interrupts, ignore_interrupts
from dice_py.compute.log_tail import log_tail
from dice_py.compute.startup import importing, keep_imported, leave_out_foreign
from dice_py.compute.stopping import StopRequest, ask_to_stop
from dice_py.errors import DiceError, UsageError
from dice_py.storage.files import make_folder
from dice_py.timing import timed, timed_seconds

if TYPE_CHECKING:
    from dice_py.events import Report

Work = Callable[..., Any]
"""A worker calls it as `work(report=report)`: a module-level function, a `functools.partial` of one, or a method of
a picklable object. Unpickling imports its module, in the worker."""

_GRACE = 5.0  # seconds between asking a process to end and killing it


def work_name(work: Callable[..., Any]) -> str:
    """ "module:name" of a function, of what a partial calls, or of the class of an object or its bound method."""
    while isinstance(work, functools.partial):
        work = work.func
    owner: Any = getattr(work, "__self__", work)
    named: Any = owner if hasattr(owner, "__qualname__") else type(owner)
    return f"{named.__module__}:{named.__qualname__}"


# --- in the worker ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One piece of work, as it is sent to a worker."""

    payload: bytes  # the pickled work: unpickling imports, and the environment has to be set before that
    name: str
    log: str
    environment: dict[str, str | None]  # None: to be removed
    since: float  # time.monotonic() of the parent; all processes of a machine share this clock
    stays: bool  # the process waits for another task after this one, if it has a result


_from_parent: queue.SimpleQueue[Any] = queue.SimpleQueue()  # the task, then replies
_requesting = threading.Lock()
_reported: set[str] = set()
"""Notes on the allocator that were reported already: a run needs one, not one for each of its processes."""


def _read_parent(parent: Connection) -> None:
    # The parent holds the other end for as long as it lives: the read fails only when it has ended.
    with contextlib.suppress(EOFError, OSError):
        while True:
            message = parent.recv()
            if isinstance(message, StopRequest):
                ask_to_stop()
            else:
                _from_parent.put(message)
    os._exit(1)


def request(report: Report, question: str, **fields: Any) -> Any:
    """In a worker: sends an event that the parent replies to (`Worker.reply`), and waits for the reply."""
    with _requesting:
        report(question, **fields)
        return _from_parent.get()


def _apply(environment: Mapping[str, str | None]) -> None:
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _print_to(log: Path) -> None:
    """Appends what this process and its libraries print, in whatever language, to `log`."""
    with log.open("ab") as handle:
        os.dup2(handle.fileno(), 1)
        os.dup2(handle.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)
    faulthandler.enable()


def _seconds(since: float, started: float, before: Mapping[str, float]) -> dict[str, float]:
    """Where the time of a task went. `before`: `timed_seconds` of the tasks before it."""
    known = {name: value - before.get(name, 0.0) for name, value in timed_seconds().items()}
    parts = {
        "spawn": started - since,
        "import": known.get("import", 0.0),
        "load": known.get("load", 0.0),
    }
    total = time.monotonic() - since
    parts |= {"work": total - sum(parts.values()), "total": total}
    return {name: round(value, 3) for name, value in parts.items()}


def _await_task(modules: Sequence[str], warm_log: str) -> Task:
    """Imports `modules`, and waits for the task. If an import fails, the process ends, and the stage starts another."""
    try:
        if modules:
            _print_to(Path(warm_log))
            with cuda_unstarted(), importing():  # a library may ask for GPUs as it is imported
                for module in modules:
                    importlib.import_module(module)
            keep_imported()
        task: Task = _from_parent.get()
        return task
    except BaseException:
        if modules:
            with contextlib.suppress(OSError):
                traceback.print_exc()
        os._exit(1)


def _work_on(task: Task, report: Report) -> tuple[bytes | memoryview, bool]:
    """Does a task; returns its last event, pickled, and whether it is a result."""
    started, before = time.monotonic(), dict(timed_seconds())
    try:
        _apply(task.environment)
        _print_to(Path(task.log))
        with timed("import"), importing():
            work: Work = pickle.loads(task.payload)
        last_event, succeeded = ForkingPickler.dumps(("result", {"value": work(report=report)})), True
    except BaseException as error:
        if not isinstance(error, DiceError | KeyboardInterrupt):
            with contextlib.suppress(OSError):  # the disk that holds the log may be full
                traceback.print_exc()
        last_event, succeeded = ForkingPickler.dumps(("failed", failure_fields(error))), False
    # The parent may read the log as soon as it has received the last event.
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    report("process", work=task.name, seconds=_seconds(task.since, started, before))
    return last_event, succeeded


def _main(events: Connection, parent: Connection, modules: Sequence[str], warm_log: str) -> None:
    ignore_interrupts()
    leave_out_foreign()
    threading.Thread(target=_read_parent, args=(parent,), daemon=True).start()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    allocator_note = check_allocator()
    if allocator_note is not None:
        _reported.add(allocator_note)  # The parent reports it; this process's own workers need not.
    task = _await_task(modules, warm_log)
    lock = threading.Lock()

    def report(event: str, **fields: Any) -> None:
        with lock:
            events.send((event, fields))

    report("started", note=allocator_note)
    while True:
        last_event, succeeded = _work_on(task, report)
        with lock:
            events.send_bytes(last_event)
        if not (task.stays and succeeded):
            break
        following = _from_parent.get()
        if following is None:  # `Worker.finish`
            break
        task = following
    events.close()
    # Libraries leave threads and, with vLLM, child processes behind; nothing of the result depends on them.
    # Their finalizers still run: a semaphore left to the resource tracker (tqdm's lock) makes it warn the user.
    with contextlib.suppress(Exception):
        multiprocessing.util._run_finalizers(0)  # type: ignore[attr-defined]
    os._exit(0)


# --- in the parent ------------------------------------------------------------------------------------------


class Worker:
    """The handle to a spawned process that does one piece of work, or several in turn if it stays.

    Args:
        modules: imported while it waits for its work, without touching a GPU.
        log: the file for its output meanwhile; None: the output is discarded.
    """

    def __init__(self, modules: Sequence[str] = (), log: Path | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self._events, child_events = context.Pipe(duplex=False)
        child_parent, self._to_worker = context.Pipe(duplex=False)
        arguments = (child_events, child_parent, tuple(modules), str(log or os.devnull))
        self._process = context.Process(target=_main, args=arguments)
        self._is_warm = bool(modules)
        self._environment = dict(os.environ)
        self._since = time.monotonic()
        # Its first start lets signals through, in some versions of Python.
        with children_ignore_interrupts():
            multiprocessing.resource_tracker.ensure_running()
        with worker_environment(), children_ignore_interrupts():
            self._process.start()
        child_events.close()
        child_parent.close()
        self._log: Path | None = None
        self._log_start = 0
        self.started = False
        """It has started its work."""
        self.ended = False
        """It has ended, and every event that it sent has been received."""

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def waitables(self) -> list[Any]:
        """Arguments of `multiprocessing.connection.wait`: readable when `receive` has an event, or it has ended."""
        return [self._events, self._process.sentinel]

    def is_alive(self) -> bool:
        """True until the process has ended."""
        return self._process.is_alive()

    def submit(
        self,
        work: Work,
        *,
        log: Path,
        name: str | None = None,
        environment: Mapping[str, str | None] | None = None,
        stays: bool = False,
    ) -> None:
        """Makes it call `work(report=…)`: once in its life, or again after a result if it stays.

        Args:
            work: pickled here.
            log: the file for its output, and its libraries', from now on.
            name: of the work, in the event `process`; None: `work_name(work)`.
            environment: set (None: removed) before anything of the work is imported, on top of this process's own
                environment as it is now.
            stays: it waits for another `submit` if this work has a result, with all that it has imported.

        Raises:
            UsageError: the log cannot be there.
        """
        make_folder(log.parent)
        if log.is_symlink():
            raise UsageError(f"{log} is a symbolic link, through which the log would be written elsewhere: remove it")
        self._log = log
        with contextlib.suppress(OSError):
            self._log_start = log.stat().st_size
        if self._is_warm:
            self._since = time.monotonic()
        before = self._environment
        changed: dict[str, str | None] = {key: None for key in before if key not in os.environ}
        changed |= {key: value for key, value in os.environ.items() if before.get(key) != value}
        payload = bytes(ForkingPickler.dumps(work))
        environment = {**changed, **(environment or {})}
        self._send(Task(payload, name or work_name(work), str(log), environment, self._since, stays))
        self._is_warm, self._environment = True, dict(os.environ)

    def reply(self, value: Any) -> None:
        """Replies to what it requested (`request`)."""
        self._send(value)

    def ask_to_stop(self) -> None:
        """Asks its work to stop at the next good place, where the work looks (compute/stopping.py)."""
        self._send(StopRequest())

    def _send(self, value: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended, which `receive` notices
            self._to_worker.send(value)

    def receive(self, timeout: float) -> tuple[str, dict[str, Any]] | None:
        """Its next event, after waiting for at most `timeout` seconds; None: no event came, or it has `ended`.

        The last event is ("result", {"value": …}) or ("failed", the fields of a `Failure`). A worker that ended without
        either was killed, or crashed: see `failure`.
        """
        try:
            while not self.ended:
                # The end of the pipe alone does not show that the worker has ended: a process that it left behind
                # (vLLM starts some) may hold the pipe open.
                if not self._events.poll(timeout):
                    self.ended = not self._process.is_alive() and not self._events.poll()
                    break
                event: tuple[str, dict[str, Any]] = self._events.recv()
                if event[0] != "started":
                    return event
                self.started = True
                note = event[1]["note"]
                if note is not None and note not in _reported:
                    _reported.add(note)
                    return "note", {"text": note}
        except (EOFError, OSError):
            self.ended = True
        return None

    def failure(self) -> Failure:
        """Why it ended without a result, as far as its exit code shows; `text` continues after its name."""
        self._process.join(_GRACE)
        code = self._process.exitcode
        after = f"after {time.monotonic() - self._since:.0f} s"
        if code == -signal.SIGTERM:
            return Failure("InterruptedRunError", 5, f"was terminated (signal 15) {after}", died=True)
        if code == -signal.SIGKILL:
            text = f"was killed {after} (signal 9: the kernel sends it when memory runs out)"
            return Failure("OutOfMemoryError", 4, text, died=True)
        return Failure("bug", 1, f"ended without a result (exit code {code}) {after}", died=True)

    def tail(self, lines: int = 30) -> str:
        """The last lines that this process wrote to its log, indented."""
        return "" if self._log is None else log_tail(self._log, self._log_start, lines)

    def join(self, timeout: float | None = None) -> None:
        """Waits until the process has ended, at most `timeout` seconds."""
        self._process.join(timeout)

    def finish(self) -> None:
        """Lets a process that has stayed after its work end in its own way, and waits for it."""
        self._send(None)
        self.join(_GRACE)

    def terminate(self) -> None:
        """Asks the process to end, without waiting for it."""
        self._process.terminate()

    def stop(self) -> None:
        """Ends the process, by force if need be, and closes the pipes. No event is received afterwards."""
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(_GRACE)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
        self.ended = True
        self._to_worker.close()
        self._events.close()
