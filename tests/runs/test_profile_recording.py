"""How a run records the events of its profile. No GPU and no model is used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from event_log import gpu, picked

from dice_py.config.loading import resolve
from dice_py.errors import DataError, InterruptedRunError
from dice_py.events import Report, no_report
from dice_py.runs import loop
from dice_py.runs.event_log import read_events
from dice_py.runs.folder import Run
from dice_py.runs.profile import profile
from dice_py.stages.job import StageResult
from dice_py.stages.mine import MineJob
from dice_py.storage.files import read_json


class Monitor:
    """A monitor of one GPU that idles."""

    problem = None

    def __init__(self, usable: set[int] | None) -> None:
        del usable

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing runs."""

    def take(self) -> list[dict[str, Any]]:
        return [gpu(0, 2, 2, 0.0, 7 * 2**20)]


class Work(MineJob):
    """A stage in the run's own process that calls `work`."""

    def __init__(self, work: Callable[[], object]) -> None:
        object.__setattr__(self, "work", work)

    def key_fields(self) -> dict[str, Any]:
        return {}

    def run(self, report: Report = no_report) -> StageResult:
        self.work()  # type: ignore[attr-defined]
        return StageResult([], {})


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Starts a run that calls `work` in place of its rounds, and fails afterwards; returns the run's folder."""
    monkeypatch.setattr(loop, "GpuMonitor", Monitor)

    def start(work: Callable[[Run], Any], ends_with: type[BaseException] = DataError) -> Path:
        def prepare(run: Run) -> None:
            work(run)
            raise DataError("on purpose")

        monkeypatch.setattr(loop, "prepare", prepare)
        with pytest.raises(ends_with):
            loop.run(resolve([], ["rounds=1"]), tmp_path / "run")
        return tmp_path / "run"

    return start


def test_a_stage_is_recorded_with_its_gpus(started) -> None:
    def work(run: Run) -> None:
        run.report("round", number=1, rounds=1)
        run.report("advance", count=1)
        run.run_stage(1, Work(lambda: None))
        run.run_stage(1, Work(lambda: pytest.fail("the stage is complete")))

    folder = started(work)
    events = [event for event in read_events(folder / "events.jsonl") if event["event"] != "gpu" or event["stage"]]
    assert [(event["event"], event.get("status")) for event in events] == [
        ("started", None),
        ("round", None),
        ("stage", "running"),
        ("gpu", None),
        ("stage", "done"),
        ("stage", "kept"),
        ("failed", None),
    ]
    (values,) = events[3]["gpus"]
    assert picked(values, "index", "idle_share", "peak_memory_bytes") == (0, 1.0, 7 * 2**20)
    assert events[3]["stage"] == "round-01/mine"
    (stage,) = profile(folder)["rounds"][0]["stages"]
    assert picked(stage, "gpu_idle_share", "gpu_mean_utilisation", "attempts") == (1, 0, 1)


@pytest.mark.parametrize(("error", "event"), [(DataError, "failed"), (KeyboardInterrupt, "interrupted")])
def test_a_run_that_stops_leaves_a_profile(started, error: type[BaseException], event: str) -> None:
    def fail() -> None:
        raise error("on purpose")

    def work(run: Run) -> None:
        run.report("round", number=1, rounds=1)
        run.run_stage(1, Work(fail))

    folder = started(work, InterruptedRunError if error is KeyboardInterrupt else error)
    assert read_events(folder / "events.jsonl")[-1]["event"] == event
    (stage,) = read_json(folder / "profile.json")["rounds"][0]["stages"]
    assert picked(stage, "stage", "status", "gpu_idle_share") == ("round-01/mine", "unfinished", 1)


def test_a_torn_line_does_not_damage_the_next_one(started) -> None:
    folder = started(lambda run: None)
    with (folder / "events.jsonl").open("a") as handle:
        handle.write('{"time": 1, "ev')
    assert started(lambda run: None) == folder
    assert [event["event"] for event in read_events(folder / "events.jsonl")] == ["started", "failed"] * 2
