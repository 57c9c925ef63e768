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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dice_py.ablation.arms import Arm
from dice_py.ablation.failed import Failures
from dice_py.ablation.lanes import PlannedRun, run_in_lanes
from dice_py.ablation.results import read_results
from dice_py.compute.failures import Failure, failure_fields
from dice_py.compute.gpu_monitor import gpu_names, usable_gpus
from dice_py.compute.interrupts import stopped_by_signals
from dice_py.config.run import RunConfig
from dice_py.errors import DiceError, InterruptedRunError, UsageError
from dice_py.events import Report, no_report
from dice_py.runs.loop import AfterRound, run
from dice_py.runs.reasons import field_values, listed
from dice_py.runs.stored_config import CONFIG_FILE, changed_settings
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
    """Runs at a time, of the synthetic world; None: one for each processor, and one where there are GPUs, which a run
    has for itself."""

    def __post_init__(self) -> None:
        if not self.seeds:
            raise UsageError("no seed is given: --seeds 3,4,5,6,7")
        twice = [seed for seed in self.seeds if self.seeds.count(seed) > 1]
        if twice:
            raise UsageError(f"seed {twice[0]} is given twice: every seed counts once in an interval")
        if self.jobs is not None and not self.config.is_world:
            raise UsageError("--jobs is for the synthetic world: runs on a model of your own stand one after another")
        if self.config.rounds.stop_when != "none":
            raise UsageError(
                "rounds.stop_when ends some runs early, and arms are compared round by round: leave it out"
            )

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
    publish: Callable[[dict[str, Any]], object] = lambda _: None,
    force: bool = False,
    change: bool = False,
) -> dict[str, Any]:
    """Makes all runs of an ablation in `out`, and returns and writes its results.

    A run that fails does not end the others. Their results are written before its error is raised.

    Args:
        report: gets a note for each run that is complete, and progress in rounds. On a model of the user's own it gets
            the events of each run.
        after_round: as of `runs.loop.run`, for runs on a model of the user's own.
        publish: called with the results when they are written.
        force: as of `runs.loop.run`.
        change: runs that are there with other settings go on with these, and what depends on a change is made again.

    Raises:
        UsageError: another process works in the folder, or settings do not go together, or (without `change`) with
            those of a run that is there. A larger or smaller number of rounds is no change.
        InterruptedRunError: Ctrl-C or SIGTERM; the same command continues.
        DiceError: of the first run that failed, whose name it begins with.
    """
    planned = ablation.planned(out)  # finds settings that do not go together before anything is made
    _check_folder(out)
    make_folder(out)
    try:
        with exclusive_lock(out / _LOCK, wait=False), stopped_by_signals():
            if not change:
                _check_settings(planned)
            times, failures = _Times(out / _TIMES, planned), Failures()
            try:
                if ablation.config.is_world:
                    _in_lanes(ablation, out, planned, times, failures, report, force)
                else:
                    _in_turn(planned, times, failures, report, after_round, force)
            finally:
                times.add()
            results = _results(ablation, planned, times) | {"failures": failures.texts}
            write_json(out / RESULTS, results)
            publish(results)
            failures.end(f"{len(planned) - len(failures.texts)} of {len(planned)} runs are complete: {out / RESULTS}")
            return results
    except BlockingIOError:
        raise UsageError(f"{out} is in use by another `dice ablate`; wait for it, or give another --out") from None
    except KeyboardInterrupt:
        raise InterruptedRunError(_AGAIN) from None


def _check_folder(out: Path) -> None:
    if (out / CONFIG_FILE).exists() or (out / "manifest.json").exists():
        raise UsageError(f"{out} holds a run, and an ablation has runs of its own: give another --out")
    if out.is_dir() and any(out.iterdir()) and not (out / _LOCK).exists():
        raise UsageError(f"{out} is not empty and holds no ablation; give another --out")


def _check_settings(planned: Sequence[PlannedRun]) -> None:
    """Refuses to make runs again under other settings, which would take the place of hours of work."""
    for one in planned:
        changed = [text for text in changed_settings(one.config, one.folder) if not text.startswith("rounds.count:")]
        if changed:
            raise UsageError(
                f"{one.folder} holds a run of other settings: {listed(changed)}. Give another --out; or --change, and "
                "what depends on them is made again"
            )


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
    planned: Sequence[PlannedRun],
    times: _Times,
    failures: Failures,
    report: Report,
    after_round: AfterRound | None,
    force: bool,
) -> None:
    """One run after the other, each with a process for each stage."""
    for number, one in enumerate(planned):
        report("note", text=f"run {number + 1} of {len(planned)}: {one.name}")
        siblings = _siblings(one)
        try:
            run(
                one.config, one.folder, report, after_round=after_round, force=force, siblings=siblings, may_differ=True
            )
        except InterruptedRunError:
            raise InterruptedRunError(_AGAIN) from None
        except DiceError as error:
            failures.add(one, Failure(**failure_fields(error)), report)
        times.add()


def _siblings(one: PlannedRun) -> list[Path]:
    """The other runs of its seed, those of earlier calls too. No other process works in them."""
    runs = one.folder.parent.parent
    return [folder for folder in sorted(runs.glob(f"*/{one.folder.name}")) if folder != one.folder]


def _in_lanes(
    ablation: Ablation,
    out: Path,
    planned: Sequence[PlannedRun],
    times: _Times,
    failures: Failures,
    report: Report,
    force: bool,
) -> None:
    rounds = sum(one.config.rounds.count for one in planned)
    done = 0

    def on_event(one: PlannedRun, event: str, **fields: Any) -> None:
        nonlocal done
        if event == "stage" and fields["stage"].endswith("/evaluate") and fields["status"] in ("done", "kept"):
            done += 1
            report("progress", stage="ablation", done=done, total=rounds, unit="rounds")
        elif event == "warning" or (event == "note" and "is made again" in fields["text"]):
            report("note", text=f"{one.name}: {fields['text']}")

    def on_end(one: PlannedRun, failure: Failure | None) -> None:
        times.add()
        if failure is None:
            report("note", text=f"{one.name} is complete")
        else:
            failures.add(one, failure, report)

    report("progress", stage="ablation", done=0, total=rounds, unit="rounds")
    run_in_lanes(
        planned,
        _siblings,
        jobs=ablation.jobs or (1 if _has_gpus(ablation.config) else len(os.sched_getaffinity(0))),
        force=force,
        logs=out / "lanes",
        on_event=on_event,
        on_end=on_end,
    )


def _has_gpus(config: RunConfig) -> bool:
    return bool(gpu_names(usable_gpus(config.devices, config.model)))


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
