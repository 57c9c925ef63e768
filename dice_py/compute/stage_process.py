"""A process of its own for each model-holding stage, and the events that it sends back.

What the libraries print goes to the stage's `worker.log`; the parent shows only events:

    progress    stage, done, total, unit     how far a stage is
    note        text                         something a person should know (which engine, what was dropped)
    shard       file, key, counts…           a shard is whole, under its final name
    process     work, seconds                where a worker's time went, told before it ends

`seconds` has `total` (from the start of the process, or for a spare from when it got its work) and its parts:
`spawn` (until the process begins with its work), `import` (of the work's module), `load` (of weights:
timing.py) and `work`, the rest. More events come from groups (compute/dispatch.py).

A process can be started ahead, to import what a stage needs while the stage before it works (`Spares`).
"""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dice_py.compute.failures import Failure
from dice_py.compute.worker import Work, Worker

if TYPE_CHECKING:
    from dice_py.events import Report


class WarmPool:
    """Processes started ahead, so that a stage need not wait until torch is imported.

    `prepare` starts one, which imports in the background (for trl about 5 s of one core and 0.5 GB) and then
    waits; `take` hands it out for `run_stage`. Those that nobody took end with `close`, and with this process.
    """

    def __init__(self) -> None:
        self._spares: dict[tuple[str, ...], Worker] = {}
        # multiprocessing waits for its children at the end of a program, and a spare would wait for its work.
        atexit.register(self.close)

    def __enter__(self) -> WarmPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def prepare(self, modules: Sequence[str], *, log: Path | None = None) -> None:
        """Starts a process that imports `modules`, unless one is there; what it prints meanwhile goes to `log`."""
        there = self._spares.get(tuple(modules))
        if there is not None and there.is_alive():
            return
        if there is not None:
            there.end()
        self._spares[tuple(modules)] = Worker(modules, log)

    def take(self, modules: Sequence[str]) -> Worker | None:
        """The process that was prepared with `modules`, done with them or nearly; None if there is none alive."""
        spare = self._spares.pop(tuple(modules), None)
        if spare is not None and not spare.is_alive():
            spare.end()
            return None
        return spare

    def close(self) -> None:
        """Ends those that nobody took."""
        atexit.unregister(self.close)
        spares, self._spares = self._spares, {}
        for spare in spares.values():
            spare.terminate()
        for spare in spares.values():
            spare.end()


def _follow(worker: Worker, report: Report) -> tuple[str, dict[str, Any]] | None:
    """Passes events on until the last, and returns that; None: it died."""
    while not worker.ended:
        heard = worker.poll(1.0)
        if heard is None:
            continue
        event, fields = heard
        if event in ("result", "failed"):
            return event, fields
        report(event, **fields)
    return None


def run_stage(
    work: Work,
    arguments: dict[str, Any],
    *,
    log: Path,
    remedy: str,
    report: Report,
    spare: Worker | None = None,
) -> Any:
    """Calls `work(report=…, **arguments)` in a spawned process and returns what it returned.

    `work` is "module:function", which only the worker imports (so the parent never loads torch), or a
    function; `arguments` are pickled. `remedy` ends the sentence when memory ran out. `spare` is the process
    to do it in (`WarmPool.take`); one that ended before it took the work up is replaced without a word.

    Raises:
        DiceError: as raised by `work`; OutOfMemoryError (4) when torch or the kernel says so.
        RuntimeError: a bug, with the traceback of the worker.
    """
    worker = spare or Worker()
    try:
        worker.submit(work, arguments, log=log)
        outcome = _follow(worker, report)
        if outcome is None and worker is spare and not worker.begun:
            worker.end()
            worker = Worker()
            worker.submit(work, arguments, log=log)
            outcome = _follow(worker, report)
        failure = worker.death() if outcome is None else None
        worker.join(None if failure is None else 0)
    finally:
        worker.end()
    if failure is None:
        assert outcome is not None
        event, fields = outcome
        if event == "result":
            return fields["value"]
        failure = Failure(**fields)
    text = f"the worker of this stage {failure.text}" if failure.died else failure.text
    if failure.kind == "OutOfMemoryError":
        # Below the first line may be the end of a group's log.
        first, *rest = text.split("\n", 1)
        text = "\n".join([f"out of memory: {first}; {remedy}. The log is {log}", *rest])
    elif failure.kind == "bug" and failure.died:
        text = f"{text}; the end of {log}:\n{worker.tail()}"
    elif failure.kind == "bug":
        text = f"a stage failed; its log is {log}\n{text}"
    raise failure.error(text)
