"""A spawned process that does one piece of work: what runs in it, and `Worker`, how its parent sees it.

Both a stage's process and a group's are one. Spawned, never forked, so that
its memory (and the GPU's) is gone when it ends. It ends with its parent: a parent that was killed leaves no orphan
behind that holds a GPU.

Imports nothing heavy, since every process imports this first: polars comes with the work.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import multiprocessing
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

from dice_py.errors import DiceError
from dice_py.timing import timed, timed_seconds

if TYPE_CHECKING:
    from dice_py.events import Report
from dice_py.compute.devices import cuda_unstarted
from dice_py.compute.failures import Failure, failure_fields

Work = str | Callable[..., Any]
"""What a worker calls: "module:function", which only the worker imports, or a function."""
_TAIL_BYTES = 2**16  # that lines are looked for in
_GRACE = 5.0  # seconds between asking a process to end and killing it


# --- in the worker ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What a worker is told to do."""

    payload: bytes  # (work, arguments): pickled apart, since unpickling imports, and the environment comes first
    name: str
    log: str
    environment: dict[str, str | None]  # None: to be removed
    since: float  # time.monotonic() of the parent, one clock for all processes of a machine


_from_parent: queue.SimpleQueue[Any] = queue.SimpleQueue()  # the order, then answers
_asking = threading.Lock()


def _hear_parent(parent: Connection) -> None:
    # The parent holds the other end for as long as it lives: the read fails only when it has ended.
    with contextlib.suppress(EOFError, OSError):
        while True:
            _from_parent.put(parent.recv())
    os._exit(1)


def ask(report: Report, question: str, **fields: Any) -> Any:
    """In a worker: sends an event that the parent answers (`Worker.answer`), and waits for the answer."""
    with _asking:
        report(question, **fields)
        return _from_parent.get()


def resolve(work: Work) -> Callable[..., Any]:
    """The function that `work` names; its module is imported."""
    if not isinstance(work, str):
        return work
    module, _, name = work.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def _apply(environment: Mapping[str, str | None]) -> None:
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _print_to(log: Path) -> None:
    """Sends what this process and its libraries print, in whatever language, to the end of `log`."""
    with log.open("ab") as handle:
        os.dup2(handle.fileno(), 1)
        os.dup2(handle.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)
    faulthandler.enable()


def _seconds(since: float, begun: float) -> dict[str, float]:
    known = timed_seconds()
    parts = {
        "spawn": begun - since,
        "import": known.get("import", 0.0),
        "load": known.get("load", 0.0),
    }
    total = time.monotonic() - since
    parts |= {"work": total - sum(parts.values()), "total": total}
    return {name: round(value, 3) for name, value in parts.items()}


def _main(events: Connection, parent: Connection, modules: Sequence[str], spare_log: str) -> None:
    threading.Thread(target=_hear_parent, args=(parent,), daemon=True).start()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        if modules:
            _print_to(Path(spare_log))
            with cuda_unstarted():  # a library may ask for GPUs as it is imported
                for module in modules:
                    importlib.import_module(module)
        order: Task = _from_parent.get()
    except BaseException:
        # Of a spare that cannot import nothing is lost: the stage starts a process, and hears what is wrong.
        if modules:
            with contextlib.suppress(OSError):
                traceback.print_exc()
        os._exit(1)
    begun = time.monotonic()
    lock = threading.Lock()

    def report(event: str, **fields: Any) -> None:
        with lock:
            events.send((event, fields))

    report("begun")
    try:
        _apply(order.environment)
        _print_to(Path(order.log))
        with timed("import"):
            work, arguments = pickle.loads(order.payload)
            function = resolve(work)
        ending = ForkingPickler.dumps(("result", {"value": function(report=report, **arguments)}))
    except BaseException as error:
        if not isinstance(error, DiceError | KeyboardInterrupt):
            with contextlib.suppress(OSError):  # the log's own disk may be what is full
                traceback.print_exc()
        ending = ForkingPickler.dumps(("failed", failure_fields(error)))
    # The parent may read the log as soon as it has heard the end.
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    report("process", work=order.name, seconds=_seconds(order.since, begun))
    with lock:
        events.send_bytes(ending)
    events.close()
    # Libraries leave threads and, vLLM, child processes behind; nothing of the result depends on them.
    # Their finalizers still run: a semaphore left to the resource tracker (tqdm's lock) makes it complain to the user.
    with contextlib.suppress(Exception):
        multiprocessing.util._run_finalizers(0)  # type: ignore[attr-defined]
    os._exit(0)


# --- in the parent ------------------------------------------------------------------------------------------


class Worker:
    """A spawned process that does one piece of work, as its parent sees it.

    Args:
        modules: what it imports while it waits for its work, without touching a GPU.
        log: where it prints meanwhile; none: nowhere.
    """

    def __init__(self, modules: Sequence[str] = (), log: Path | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self._events, child_events = context.Pipe(duplex=False)
        child_parent, self._orders = context.Pipe(duplex=False)
        arguments = (child_events, child_parent, tuple(modules), str(log or os.devnull))
        self._process = context.Process(target=_main, args=arguments)
        self._is_spare = bool(modules)
        self._environment = dict(os.environ)
        self._since = time.monotonic()
        self._process.start()
        child_events.close()
        child_parent.close()
        self._log: Path | None = None
        self._log_start = 0
        self.begun = False
        """It has taken its work up."""
        self.ended = False
        """It has ended, and nothing that it sent is left to hear."""

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def awaited(self) -> list[Any]:
        """What `multiprocessing.connection.wait` waits on: readable when `poll` has something to say."""
        return [self._events, self._process.sentinel]

    def is_alive(self) -> bool:
        """True until the process has ended."""
        return self._process.is_alive()

    def submit(
        self,
        work: Work,
        arguments: dict[str, Any],
        *,
        log: Path,
        name: str | None = None,
        environment: Mapping[str, str | None] | None = None,
    ) -> None:
        """Tells it to call `work(report=…, **arguments)`; once in its life.

        Args:
            arguments: pickled.
            log: where it and its libraries print from now on.
            name: of the work, in the event `process`; none: its own.
            environment: set (None: removed) before anything of the work is imported, on top of this process's own
                environment as it is now.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        with contextlib.suppress(OSError):
            self._log_start = log.stat().st_size
        if self._is_spare:
            self._since = time.monotonic()
        if name is None:
            name = work if isinstance(work, str) else f"{work.__module__}:{work.__qualname__}"
        before = self._environment
        changed: dict[str, str | None] = {key: None for key in before if key not in os.environ}
        changed |= {key: value for key, value in os.environ.items() if before.get(key) != value}
        payload = bytes(ForkingPickler.dumps((work, arguments)))
        self._send(Task(payload, name, str(log), {**changed, **(environment or {})}, self._since))

    def answer(self, value: Any) -> None:
        """Answers what it asked (`ask`)."""
        self._send(value)

    def _send(self, value: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended, as `poll` will tell
            self._orders.send(value)

    def poll(self, timeout: float) -> tuple[str, dict[str, Any]] | None:
        """Its next event, waiting at most `timeout` seconds; None: none came, or it has `ended`.

        The last is ("result", {"value": …}) or ("failed", the fields of a `Failure`); one that ended without either
        has died.
        """
        try:
            while not self.ended:
                # The pipe's end alone would not tell that the worker is gone: a process that it left behind (vLLM
                # starts some) may hold it open.
                if not self._events.poll(timeout):
                    self.ended = not self._process.is_alive() and not self._events.poll()
                    break
                event: tuple[str, dict[str, Any]] = self._events.recv()
                if event[0] != "begun":
                    return event
                self.begun = True
        except (EOFError, OSError):
            self.ended = True
        return None

    def death(self) -> Failure:
        """Why it ended without a result, as far as its exit code tells; `text` goes on from its name."""
        self._process.join(_GRACE)
        code = self._process.exitcode
        after = f"after {time.monotonic() - self._since:.0f} s"
        if code == -signal.SIGTERM:
            return Failure("InterruptedRunError", 5, f"was told to stop (signal 15) {after}", died=True)
        if code == -signal.SIGKILL:
            text = f"was killed {after} (signal 9: the kernel's, when memory runs out)"
            return Failure("OutOfMemoryError", 4, text, died=True)
        return Failure("bug", 1, f"ended without a result (exit code {code}) {after}", died=True)

    def tail(self, lines: int = 30) -> str:
        """The last lines that this process wrote to its log, indented."""
        if self._log is None:
            return ""
        try:
            with self._log.open("rb") as handle:
                end = handle.seek(0, os.SEEK_END)
                handle.seek(max(self._log_start, end - _TAIL_BYTES))
                text = handle.read().decode("utf-8", errors="replace").strip().splitlines()
        except OSError:
            return ""
        return "\n".join("    " + line for line in text[-lines:])

    def join(self, timeout: float | None = None) -> None:
        """Waits until the process has ended, at most `timeout` seconds."""
        self._process.join(timeout)

    def terminate(self) -> None:
        """Asks the process to end, without waiting for it."""
        self._process.terminate()

    def end(self) -> None:
        """Sees to it that the process is gone, and lets go of it. Nothing is heard from it afterwards."""
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(_GRACE)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
        self.ended = True
        self._orders.close()
        self._events.close()
