"""How a run records the events of its profile."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from event_log import picked

from dice_py.config.loading import resolve
from dice_py.errors import DataError
from dice_py.runs import loop as rounds
from dice_py.runs.profile import profile, read_events
from dice_py.storage.files import read_json


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Runs `work` as the rounds of a run, with a nvidia-smi of one GPU that idles; returns the run's folder."""
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin/nvidia-smi"
    script.write_text('#!/bin/sh\nwhile :; do echo "0, 0, 7, 80"; sleep 0.01; done\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def start(work: Callable[[rounds.Run], Any]) -> Path:
        monkeypatch.setattr(rounds, "_rounds", work)
        rounds.run(resolve([], ["rounds=1"]), tmp_path / "run")
        return tmp_path / "run"

    return start


def watched(this: rounds.Run, then: type[BaseException] | None = None) -> dict[str, Any]:
    """A stage's work that ends once the GPU was seen."""
    assert this._watch is not None
    end = time.monotonic() + 20
    while not this._watch._seen:
        assert time.monotonic() < end
        time.sleep(0.01)
    if then is not None:
        raise then("on purpose")
    return {"files": [], "counts": {}}


def test_a_stage_is_told_with_its_gpus(started) -> None:
    def work(this: rounds.Run) -> dict[str, Any]:
        this.report("round", number=1, rounds=1)
        this.report("advance", count=1)
        this.stage("round-01/score", "key", lambda entry: True, lambda: watched(this))
        this.stage("round-01/score", "key", lambda entry: True, lambda: pytest.fail("it is whole"))
        return {}

    folder = started(work)
    told = [event for event in read_events(folder / "events.jsonl") if event["event"] != "gpu" or event["stage"]]
    assert [(event["event"], event.get("status")) for event in told] == [
        ("started", None),
        ("round", None),
        ("stage", "running"),
        ("gpu", None),
        ("stage", "done"),
        ("stage", "kept"),
    ]
    (gpu,) = told[3]["gpus"]
    assert picked(gpu, "index", "idle_share", "peak_memory_bytes") == (0, 1.0, 7 * 2**20)
    assert told[3]["stage"] == "round-01/score"
    (stage,) = profile(folder)["rounds"][0]["stages"]
    assert picked(stage, "gpu_idle_share", "gpu_mean_utilisation", "attempts") == (1, 0, 1)


@pytest.mark.parametrize(("error", "event"), [(DataError, "failed"), (KeyboardInterrupt, "interrupted")])
def test_a_run_that_stops_leaves_a_profile(started, tmp_path: Path, error: type[BaseException], event: str) -> None:
    def work(this: rounds.Run) -> None:
        this.report("round", number=1, rounds=1)
        this.stage("round-01/score", "key", lambda entry: True, lambda: watched(this, error))

    with pytest.raises(rounds.InterruptedRunError if error is KeyboardInterrupt else error):
        started(work)
    folder = tmp_path / "run"
    assert read_events(folder / "events.jsonl")[-1]["event"] == event
    (stage,) = read_json(folder / "profile.json")["rounds"][0]["stages"]
    assert picked(stage, "stage", "status", "gpu_idle_share") == ("round-01/score", "unfinished", 1)


def test_a_torn_line_takes_no_later_one_with_it(started, tmp_path: Path) -> None:
    folder = started(lambda this: {})
    with (folder / "events.jsonl").open("a") as handle:
        handle.write('{"time": 1, "ev')
    assert started(lambda this: {}) == folder
    assert [event["event"] for event in read_events(folder / "events.jsonl")] == ["started", "started"]
