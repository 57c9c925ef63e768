"""Runs an ablation: each arm with each seed is a run folder, and runs of one seed share what has the same key.

    DIR/ablation.json             the results (docs/ablation.md)
    DIR/runs/ARM/seed-N/          run folders, as of `dice run`
    DIR/lanes/lane-1.log          what libraries print

Of one seed all arms have the same π_1 and the same samples of round 1: generation and scoring are done once, and so is
the mining of arms that take the length out in the same way. A second call keeps what is complete.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dice_py.ablation.arms import Arm
from dice_py.ablation.lanes import PlannedRun, run_in_lanes
from dice_py.ablation.results import read_results
from dice_py.compute.failures import Failure, failure_fields
from dice_py.compute.interrupts import stopped_by_signals
from dice_py.config.run import RunConfig
from dice_py.errors import DiceError, InterruptedRunError, UsageError
from dice_py.events import Report, no_report
from dice_py.runs.loop import AfterRound, run
from dice_py.runs.reasons import field_values
from dice_py.storage.files import make_folder, read_sealed, write_json, write_sealed
from dice_py.storage.keys import digest, versions
from dice_py.storage.lock import exclusive_lock

RESULTS = "ablation.json"
_TIMES = "times.json"
_LOCK = ".lock"
_AGAIN = "interrupted; what is complete is kept. The same command continues"


@dataclass(frozen=True)
class Ablation:
    """What is run."""

    config: RunConfig
    """What all arms share; its seeds are replaced."""
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    jobs: int | None = None
    """Runs at a time, of the synthetic world; None: one for each processor."""

    def __post_init__(self) -> None:
        if not self.seeds:
            raise UsageError("no seed is given: --seeds 3,4,5,6,7")
        twice = [seed for seed in self.seeds if self.seeds.count(seed) > 1]
        if twice:
            raise UsageError(f"seed {twice[0]} is given twice: every seed counts once in an interval")
        if self.jobs is not None and not self.config.is_world:
            raise UsageError("--jobs is for the synthetic world: runs on a model of your own stand one after another")

    def planned(self, out: Path) -> list[PlannedRun]:
        """All runs; of one seed in the order of the arms."""
        return [
            PlannedRun(
                f"{arm.name}/seed-{seed}",
                seed,
                out / "runs" / arm.name / f"seed-{seed}",
                arm.config(self.config, seed),
            )
            for seed in self.seeds
            for arm in self.arms
        ]


def run_ablation(
    ablation: Ablation,
    out: Path,
    report: Report = no_report,
    *,
    after_round: AfterRound | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Makes all runs of an ablation in `out`, and returns and writes its results.

    Args:
        report: gets a note for each run that is complete, and progress in rounds. On a model of the user's own it gets
            the events of each run.
        after_round, force: as of `runs.loop.run`, for runs on a model of the user's own.

    Raises:
        UsageError: another process works in the folder, or settings do not go together.
        InterruptedRunError: Ctrl-C or SIGTERM; the same command continues.
        DiceError: of a run, whose name it begins with.
    """
    planned = ablation.planned(out)  # finds settings that do not go together before anything is made
    if out.is_dir() and any(out.iterdir()) and not (out / _LOCK).exists():
        raise UsageError(f"{out} is not empty and holds no ablation; give another --out")
    make_folder(out)
    try:
        lock = exclusive_lock(out / _LOCK, wait=False)
        with lock, stopped_by_signals():
            times = _Times(out / _TIMES, planned)
            if ablation.config.is_world:
                _in_lanes(ablation, out, planned, times, report)
            else:
                _in_turn(planned, times, report, after_round, force)
            results = _results(ablation, planned, times)
            write_json(out / RESULTS, results)
            return results
    except BlockingIOError:
        raise UsageError(f"{out} is in use by another `dice ablate`; wait for it, or give another --out") from None
    except KeyboardInterrupt:
        raise InterruptedRunError(_AGAIN) from None


class _Times:
    """The seconds that each run took in all, over several calls; a run that was complete before adds none."""

    def __init__(self, file: Path, planned: Sequence[PlannedRun]) -> None:
        self._file = file
        self._key = digest("times", [one.name for one in planned])
        stored = read_sealed(file, self._key) or {}
        self.seconds = float(stored.get("seconds", 0.0))
        self._since = time.monotonic()

    def add(self) -> None:
        """Adds the time since the last call."""
        now = time.monotonic()
        self.seconds += now - self._since
        self._since = now
        write_sealed(self._file, {"seconds": self.seconds}, self._key)


def _in_turn(
    planned: Sequence[PlannedRun], times: _Times, report: Report, after_round: AfterRound | None, force: bool
) -> None:
    """One run after the other, each with a process for each stage."""
    for number, one in enumerate(planned):
        report("note", text=f"run {number + 1} of {len(planned)}: {one.name}")
        siblings = _siblings(planned, one)
        try:
            run(
                one.config, one.folder, report, after_round=after_round, force=force, siblings=siblings, may_differ=True
            )
        except InterruptedRunError:
            raise InterruptedRunError(_AGAIN) from None
        except DiceError as error:
            failure = Failure(**failure_fields(error))
            raise failure.error(f"{one.name}: {error}. Its folder is {one.folder}") from error
        times.add()


def _siblings(planned: Sequence[PlannedRun], one: PlannedRun) -> list[Path]:
    return [other.folder for other in planned if other.seed == one.seed and other.folder != one.folder]


def _in_lanes(ablation: Ablation, out: Path, planned: Sequence[PlannedRun], times: _Times, report: Report) -> None:
    rounds = sum(one.config.rounds.count for one in planned)
    done = 0

    def on_event(one: PlannedRun, event: str, **fields: Any) -> None:
        nonlocal done
        if event == "stage" and fields["stage"].endswith("/evaluate") and fields["status"] in ("done", "kept"):
            done += 1
            report("progress", stage="ablation", done=done, total=rounds, unit="rounds")
        elif event == "warning" or (event == "note" and "is made again" in fields["text"]):
            report("note", text=f"{one.name}: {fields['text']}")

    def on_done(one: PlannedRun) -> None:
        times.add()
        report("note", text=f"{one.name} is complete")

    report("progress", stage="ablation", done=0, total=rounds, unit="rounds")
    run_in_lanes(
        planned,
        lambda one: _siblings(planned, one),
        jobs=ablation.jobs or len(os.sched_getaffinity(0)),
        logs=out / "lanes",
        on_event=on_event,
        on_done=on_done,
    )


def _results(ablation: Ablation, planned: Sequence[PlannedRun], times: _Times) -> dict[str, Any]:
    places = [(arm.name, seed) for seed in ablation.seeds for arm in ablation.arms]  # as `planned`
    folders = {place: one.folder for place, one in zip(places, planned, strict=True)}
    results = read_results(folders, ablation.arms, ablation.seeds, ablation.config)
    return results | {
        "settings": shared_settings(ablation.config),
        "seconds": times.seconds,
        "machine": _machine(),
        "versions": versions("torch", "transformers", "trl", "polars"),
    }


def shared_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that differ from the defaults of a run of this kind, by dotted name."""
    from dice_py.config.loading import resolve

    model = {"model": config.model.model_dump(mode="json"), "data": config.data.model_dump(mode="json")}
    defaults = field_values(resolve(overrides={} if config.is_world else model).model_dump(mode="json"))
    own: Mapping[str, Any] = field_values(config.model_dump(mode="json"))
    return {name: value for name, value in own.items() if value != defaults.get(name) and name != "rounds.count"}


def _machine() -> str:
    cores = len(os.sched_getaffinity(0))
    return f"{cores} processor cores, {_processor()}, {platform.system()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
