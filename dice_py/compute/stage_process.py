"""A process for each model-holding stage: `run_in_subprocess`, the events that it sends, and `WarmPool`.

What the libraries print goes to the stage's `worker.log`. The parent receives events:

    progress    stage, done, total, unit     counts of a stage
    note        text                         a sentence for the user (the engine, dropped rows, …)
    shard       file, key, counts…           a shard is complete, under its final name
    process     work, seconds                where a worker's time went, sent before it ends

`seconds` has `total` (from the start of the process, or for a warm one from when it received its work) and its parts:
`spawn` (until the process starts its work), `import` (of the work's module), `load` (of weights: timing.py) and `work`,
the rest. Groups of devices send more events (compute/dispatch.py).
"""

from __future__ import annotations

import atexit
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dice_py.compute.failures import Failure
from dice_py.compute.interrupts import asked_by_signals
from dice_py.compute.worker import Work, Worker

if TYPE_CHECKING:
    from dice_py.events import Report


class WarmPool:
    """Processes that are started ahead, so that a stage need not wait for the import of torch.

    `prepare` starts one, which imports in the background (for TRL about 5 s of one core and 0.5 GB) and then waits.
    `take` hands it to `run_in_subprocess`. Processes that nobody took end with `close`, and with this process.
    """

    def __init__(self) -> None:
        self._workers: dict[tuple[str, ...], Worker] = {}
        self._stayed: dict[tuple[str, ...], Worker] = {}
        # multiprocessing waits for its children at the end of a program, and a warm worker would wait for its work.
        atexit.register(self.close)

    def __enter__(self) -> WarmPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def prepare(self, modules: Sequence[str], *, log: Path | None = None) -> None:
        """Starts a process that imports `modules`, unless there is one; its output goes to `log` meanwhile."""
        present = self._workers.get(tuple(modules))
        if present is not None and present.is_alive():
            return
        if present is not None:
            present.stop()
        self._workers[tuple(modules)] = Worker(modules, log)

    def take(self, modules: Sequence[str]) -> Worker | None:
        """The process that was prepared with `modules`, which may still be importing; None if none is alive."""
        worker = self._stayed.pop(tuple(modules), None) or self._workers.pop(tuple(modules), None)
        if worker is not None and not worker.is_alive():
            worker.stop()
            return None
        return worker

    def keep(self, modules: Sequence[str], worker: Worker) -> None:
        """Takes in a process that has stayed after its work, for the next stage, which needs `modules`."""
        self._stayed[tuple(modules)] = worker

    def end_stayed(self) -> None:
        """Ends the processes that have stayed and were not taken: they hold models."""
        stayed, self._stayed = self._stayed, {}
        for worker in stayed.values():
            worker.stop()

    def close(self) -> None:
        """Ends the processes that nobody took."""
        atexit.unregister(self.close)
        self.end_stayed()
        workers, self._workers = self._workers, {}
        for worker in workers.values():
            worker.terminate()
        for worker in workers.values():
            worker.stop()


def _forward_events(worker: Worker, report: Report, is_asked: Callable[[], bool]) -> tuple[str, dict[str, Any]] | None:
    """Reports all events but the last, and returns that one; None: the worker ended without it."""
    told = False
    while not worker.ended:
        if is_asked() and not told:
            worker.ask_to_stop()
            told = True
        received = worker.receive(1.0)
        if received is None:
            continue
        event, fields = received
        if event in ("result", "failed"):
            return event, fields
        report(event, **fields)
    return None


def run_in_subprocess(
    work: Work,
    *,
    log: Path,
    remedy: str,
    report: Report,
    warm: Worker | None = None,
    name: str | None = None,
    keep: Callable[[Worker], None] | None = None,
    grace: float | None = None,
) -> Any:
    """Calls `work(report=…)` in a spawned process and returns its value.

    Args:
        work: see `compute.worker.Work`; it and its value are pickled. Its module must not import torch at the top, so
            that this process does not load torch either.
        log: the file for the process's output.
        remedy: ends the sentence when memory ran out.
        warm: the process to run it in (`WarmPool.take`). If that process ended before it started the work, another
            one is started.
        name: of the work, in the event `process`.
        keep: gets the process after a result, with all that it holds, instead of its end.
        grace: seconds that the work has to stop in after SIGTERM or SIGUSR1, when it is asked to (compute/stopping.py).
            None: it does not look, and is ended at once.

    Raises:
        DiceError: as raised by `work`; OutOfMemoryError (4) when torch or the kernel reports it.
        RuntimeError: a bug, with the traceback of the worker.
    """
    asked = contextlib.nullcontext(lambda: False) if grace is None else asked_by_signals(grace)
    with asked as is_asked:
        return _run(work, log, remedy, report, warm, name, keep, is_asked)


def _run(
    work: Work,
    log: Path,
    remedy: str,
    report: Report,
    warm: Worker | None,
    name: str | None,
    keep: Callable[[Worker], None] | None,
    is_asked: Callable[[], bool],
) -> Any:
    worker, kept = warm or Worker(), False
    try:
        worker.submit(work, log=log, name=name, stays=keep is not None)
        outcome = _forward_events(worker, report, is_asked)
        if outcome is None and worker is warm and not worker.started:
            worker.stop()
            worker = Worker()
            worker.submit(work, log=log, name=name, stays=keep is not None)
            outcome = _forward_events(worker, report, is_asked)
        if keep is not None and outcome is not None and outcome[0] == "result":
            keep(worker)
            kept = True
            return outcome[1]["value"]
        failure = worker.failure() if outcome is None else None
        worker.join(None if failure is None else 0)
    finally:
        if not kept:
            worker.stop()
    if failure is None:
        assert outcome is not None
        event, fields = outcome
        if event == "result":
            return fields["value"]
        failure = Failure(**fields)
    raise _stage_error(failure, worker, log, remedy)


def _stage_error(failure: Failure, worker: Worker, log: Path, remedy: str) -> Exception:
    text = f"the worker of this stage {failure.text}" if failure.died else failure.text
    if failure.kind == "OutOfMemoryError":
        # The lines below the first may be the end of a group's log.
        first, *rest = text.split("\n", 1)
        text = "\n".join([f"out of memory: {first}; {remedy}. The log is {log}", *rest])
    elif failure.kind == "bug" and failure.died:
        text = f"{text}; the end of {log}:\n{worker.tail()}"
    elif failure.kind == "bug":
        text = f"a stage failed; its log is {log}\n{text}"
    return failure.error(text)
