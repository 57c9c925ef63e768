"""Run folders with made-up events, for the tests of the profile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dice_py.config.loading import dump, resolve
from dice_py.runs.profile import profile
from dice_py.storage.files import Manifest


class Log:
    """A run folder whose events have times that the test chooses."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(dump(resolve([], ["rounds=1"])))
        self.folder = folder
        self.manifest = Manifest(folder / "manifest.json")

    def event(self, at: float, event: str, **fields: Any) -> None:
        with (self.folder / "events.jsonl").open("a") as handle:
            handle.write(json.dumps({"time": at, "event": event, **fields}) + "\n")

    def running(self, at: float, stage: str) -> None:
        self.manifest.record(f"round-01/{stage}", status="running", seconds=None)
        self.event(at, "stage", stage=f"round-01/{stage}", status="running")

    def done(self, at: float, stage: str, seconds: float) -> None:
        self.manifest.record(f"round-01/{stage}", status="done", seconds=seconds)
        self.event(at, "stage", stage=f"round-01/{stage}", status="done", seconds=seconds, counts={})

    def process(self, at: float, spawn: float, imports: float, load: float, work: float, **group: int) -> None:
        seconds = {"spawn": spawn, "import": imports, "load": load, "work": work}
        self.event(at, "process", work="a:b", seconds={**seconds, "total": spawn + imports + load + work}, **group)

    def stages(self) -> dict[str, dict[str, Any]]:
        """The profile's values of each stage of the first round."""
        return {
            stage["stage"].removeprefix("round-01/"): stage for stage in profile(self.folder)["rounds"][0]["stages"]
        }


def gpu(index: int, samples: int, idle: int, busy: float, peak: int) -> dict[str, Any]:
    """A GPU's part of a `gpu` event."""
    return {
        "index": index,
        "samples": samples,
        "idle_samples": idle,
        "idle_share": idle / samples,
        "mean_utilisation": busy,
        "peak_memory_bytes": peak,
        "memory_bytes": 100,
    }


def picked(values: dict[str, Any], *names: str) -> tuple[Any, ...]:
    """The values under `names`."""
    return tuple(values[name] for name in names)


def one_round(log: Log) -> None:
    """54 s: 4 before the round, 40 of generating, 2 of mining, 8 between them."""
    log.event(1000, "started", pid=1)
    log.process(1002, 0.5, 1, 0, 0)
    log.event(1004, "round", number=1, rounds=1)
    log.event(1006, "gpu", stage=None, gpus=[gpu(0, 2, 2, 0.0, 5), gpu(1, 2, 2, 0.0, 5)])
    log.running(1006, "generate")
    rates = {"sequences": 10, "tokens_per_second": 1}
    log.event(1030, "throughput", stage="generate", tokens=1300, seconds=13, flops=100, mfu=0.5, **rates)
    log.event(1041, "throughput", stage="generate", tokens=1100, seconds=16, flops=300, mfu=0.25, **rates)
    log.process(1046, 0.5, 3.5, 6, 29.5)
    log.event(1046, "gpu", stage="round-01/generate", gpus=[gpu(0, 40, 10, 0.6, 70), gpu(1, 40, 20, 0.4, 80)])
    log.done(1046, "generate", 40)
    log.running(1048, "mine")
    log.done(1050, "mine", 2)
    log.event(1054, "finished")


STARTS = ("processes", "spawn_seconds", "import_seconds", "load_seconds", "start_up_seconds")


def resumed(log: Log) -> None:
    """Killed while it generated, failed while it scored, then finished."""
    log.event(0, "started")
    log.event(10, "round", number=1)
    log.running(12, "generate")
    log.process(15, 1, 1, 1, 0)
    log.event(16, "throughput", stage="generate", tokens=10**9, seconds=1)
    log.event(20, "shard", file="x")
    with (log.folder / "events.jsonl").open("a") as handle:
        handle.write(
            '{"time": 25, "event": "sha\n["no", "event"]\n{"event": "no time"}\n{"time": true, "event": "x"}\n'
        )
    log.event(1000, "started")
    log.event(1003, "round", number=1)
    log.running(1005, "generate")
    log.process(1025, 1, 2, 3, 13)
    log.done(1025, "generate", 20)
    log.running(1026, "score")
    log.event(1030, "failed", text="x")
    log.event(2000, "started")
    log.event(2001, "round", number=1)
    log.event(2002, "stage", stage="round-01/generate", status="kept", seconds=20, counts={})
    log.running(2003, "score")
    log.done(2013, "score", 10)
    log.event(2014, "finished")
