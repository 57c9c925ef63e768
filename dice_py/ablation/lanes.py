"""Runs of an ablation side by side, each lane a process that does one run after the other.

A lane imports torch once, and the stages of its runs work in it: what suits models of a few MB, such as those of the
synthetic world. A run on a model of the user's own has a process for each stage, as `dice run` does, and needs no lane.

Of one seed only one run works at a time, so that the next one finds its stages to take over.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from dice_py.compute.failures import Failure
from dice_py.compute.worker import Worker
from dice_py.config.run import RunConfig
from dice_py.events import Report, no_report
from dice_py.runs.loop import run
from dice_py.stages.registry import REGISTRY
from dice_py.storage.files import make_folder

_REPORTED = ("stage", "note", "warning")
_TIMEOUT = 1.0  # seconds between two looks at whether a lane has ended


@dataclass(frozen=True)
class PlannedRun:
    """One run of an ablation."""

    name: str
    """ "both/seed-3"."""
    seed: int
    folder: Path
    config: RunConfig


def run_in_lane(
    config: RunConfig, folder: Path, siblings: Sequence[Path], threads: int, force: bool, report: Report = no_report
) -> None:
    """Runs a config in this process, with all of its stages. Only events of `_REPORTED` are reported."""
    import torch

    torch.set_num_threads(threads)

    def some(event: str, **fields: Any) -> None:
        if event in _REPORTED:  # others have names that a worker uses itself
            report(event, **fields)

    run(config, folder, some, force=force, siblings=siblings, in_process=True, may_differ=True)


class _Lane:
    def __init__(self, log: Path, threads: int, force: bool) -> None:
        self._log, self._threads, self._force = log, threads, force
        self.worker = self._start()
        self.planned: PlannedRun | None = None

    def _start(self) -> Worker:
        # All that its stages import: what is there before the first run is never searched for garbage.
        modules = dict.fromkeys(module for stage in REGISTRY.values() for module in stage.imports)
        return Worker(tuple(modules), self._log)

    def submit(self, planned: PlannedRun, siblings: Sequence[Path]) -> None:
        """Starts a run in it."""
        if self.worker.ended:  # with a run that failed
            self.worker = self._start()
        self.planned = planned
        work = partial(run_in_lane, planned.config, planned.folder, siblings, self._threads, self._force)
        self.worker.submit(work, log=self._log, name=planned.name, stays=True)

    def outcome(self, on_event: Callable[..., None]) -> tuple[str, dict[str, Any]] | None:
        """Passes on what it has sent; returns the last event of its run, None while it works."""
        while True:
            received = self.worker.receive(0)
            if received is None:
                break
            event, fields = received
            if event in ("result", "failed"):
                return event, fields
            on_event(event, **fields)
        if self.worker.ended:
            return "failed", vars(self.worker.failure())
        return None


def run_in_lanes(
    planned: Iterable[PlannedRun],
    siblings: Callable[[PlannedRun], Sequence[Path]],
    *,
    jobs: int,
    force: bool,
    logs: Path,
    on_event: Callable[..., None],
    on_end: Callable[[PlannedRun, Failure | None], None],
) -> None:
    """Does all runs, `jobs` at a time.

    Args:
        siblings: the folders from which a run may take stages over, asked when it begins.
        logs: the folder of the lanes' output.
        on_event: is called as `on_event(planned, event, **fields)`.
        force: as of `runs.loop.run`.
        on_end: is called when a run is complete, or has failed. If it raises, the other runs are stopped.
    """
    waiting = list(planned)
    make_folder(logs)
    count = min(jobs, len({one.seed for one in waiting}))  # of one seed only one run works at a time
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    lanes = [_Lane(logs / f"lane-{number + 1}.log", threads, force) for number in range(count)]
    try:
        while True:
            for lane in lanes:
                busy = [other.planned.seed for other in lanes if other.planned is not None]
                following = _next(waiting, busy)
                if lane.planned is None and following is not None:
                    waiting.remove(following)
                    lane.submit(following, siblings(following))
            working = [lane for lane in lanes if lane.planned is not None]
            if not working:
                for lane in lanes:
                    if not lane.worker.ended:
                        lane.worker.finish()
                return
            wait([handle for lane in working for handle in lane.worker.waitables], _TIMEOUT)
            for lane in working:
                assert lane.planned is not None
                outcome = lane.outcome(partial(on_event, lane.planned))
                if outcome is None:
                    continue
                event, fields = outcome
                planned_run, lane.planned = lane.planned, None
                failure = _failure(fields, count) if event == "failed" else None
                on_end(planned_run, failure)
                if failure is not None:
                    lane.worker.stop()
    finally:
        for lane in lanes:
            lane.worker.terminate()
        for lane in lanes:
            lane.worker.stop()


def _next(waiting: Sequence[PlannedRun], busy: Sequence[int]) -> PlannedRun | None:
    """The next run of the seed that has most of them left, of the seeds that no lane works on."""
    left = [planned.seed for planned in waiting]
    free = [planned for planned in waiting if planned.seed not in busy]
    return max(free, key=lambda planned: left.count(planned.seed), default=None)


def _failure(fields: dict[str, Any], lanes: int) -> Failure:
    failure = Failure(**fields)
    if failure.kind == "OutOfMemoryError" and lanes > 1:
        return replace(failure, text=f"{failure.text}; fewer runs at a time need less memory: --jobs 1")
    return failure
