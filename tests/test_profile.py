"""A run's profile: figures worked out by hand from made-up events, and how a run comes to record them."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli.main import main
from cli.progress import Display
from dice_py.config.loading import dump, resolve
from dice_py.errors import DataError
from dice_py.runs import loop as rounds
from dice_py.runs.profile import profile, read_events, write_profile
from dice_py.stages.registry import STAGES
from dice_py.storage.files import Manifest, read_json


class Log:
    """A run folder whose events are told at times of the test's own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(dump(resolve([], ["rounds=1"])))
        self.folder = folder
        self.manifest = Manifest(folder / "manifest.json")

    def tell(self, at: float, event: str, **fields: Any) -> None:
        with (self.folder / "events.jsonl").open("a") as handle:
            handle.write(json.dumps({"time": at, "event": event, **fields}) + "\n")

    def running(self, at: float, stage: str) -> None:
        self.manifest.record(f"round-01/{stage}", status="running", seconds=None)
        self.tell(at, "stage", stage=f"round-01/{stage}", status="running")

    def done(self, at: float, stage: str, seconds: float) -> None:
        self.manifest.record(f"round-01/{stage}", status="done", seconds=seconds)
        self.tell(at, "stage", stage=f"round-01/{stage}", status="done", seconds=seconds, counts={})

    def process(self, at: float, spawn: float, imports: float, load: float, work: float, **group: int) -> None:
        seconds = {"spawn": spawn, "import": imports, "load": load, "work": work}
        self.tell(at, "process", work="a:b", seconds={**seconds, "total": spawn + imports + load + work}, **group)

    def stages(self) -> dict[str, dict[str, Any]]:
        """What the profile says of each stage of the first round."""
        return {
            stage["stage"].removeprefix("round-01/"): stage for stage in profile(self.folder)["rounds"][0]["stages"]
        }


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "run")


def gpu(index: int, samples: int, idle: int, busy: float, peak: int) -> dict[str, Any]:
    return {
        "index": index,
        "samples": samples,
        "idle_samples": idle,
        "idle_share": idle / samples,
        "mean_utilisation": busy,
        "peak_memory_bytes": peak,
        "memory_bytes": 100,
    }


def picked(found: dict[str, Any], *names: str) -> tuple[Any, ...]:
    return tuple(found[name] for name in names)


def one_round(log: Log) -> None:
    """54 s: 4 before the round, 40 of generating, 2 of mining, 8 between them."""
    log.tell(1000, "started", pid=1)
    log.process(1002, 0.5, 1, 0, 0)
    log.tell(1004, "round", number=1, rounds=1)
    log.tell(1006, "gpu", stage=None, gpus=[gpu(0, 2, 2, 0.0, 5), gpu(1, 2, 2, 0.0, 5)])
    log.running(1006, "generate")
    rates = {"sequences": 10, "tokens_per_second": 1}
    log.tell(1030, "throughput", stage="generate", tokens=1300, seconds=13, flops=100, mfu=0.5, **rates)
    log.tell(1041, "throughput", stage="generate", tokens=1100, seconds=16, flops=300, mfu=0.25, **rates)
    log.process(1046, 0.5, 3.5, 6, 29.5)
    log.tell(1046, "gpu", stage="round-01/generate", gpus=[gpu(0, 40, 10, 0.6, 70), gpu(1, 40, 20, 0.4, 80)])
    log.done(1046, "generate", 40)
    log.running(1048, "mine")
    log.done(1050, "mine", 2)
    log.tell(1054, "finished")


STARTS = ("processes", "spawn_seconds", "import_seconds", "load_seconds", "start_up_seconds")


def test_a_round(log: Log) -> None:
    one_round(log)
    found = profile(log.folder)
    json.dumps(found, allow_nan=False)
    (one,) = found["rounds"]
    generate, mine = one["stages"]
    between = one["between"]
    assert picked(one, "round", "seconds", "lost_seconds") == ("round-01", 50, 0)
    assert [picked(part, "seconds", "share") for part in (generate, mine, between)] == [(40, 0.8), (2, 0.04), (8, 0.16)]
    assert picked(generate, "stage", "status", "attempts", "groups") == ("round-01/generate", "done", 1, None)
    assert picked(generate, *STARTS, "work_seconds", "rest_seconds") == (1, 0.5, 3.5, 6, 10, 29.5, 0.5)
    # It runs in the parent.
    assert picked(mine, *STARTS, "work_seconds", "rest_seconds") == (0, 0, 0, 0, 0, 2, 0)
    assert picked(mine, "gpu_idle_share", "gpu_mean_utilisation", "gpus", "tokens", "mfu") == (None,) * 5
    # Shards were worked on from 1017 to 1030 and from 1025 to 1041: for 24 seconds. 400 FLOPs of 200 + 1200.
    assert picked(generate, "tokens", "tokens_per_second", "mfu") == (2400, 100, 0.285714)
    assert generate["throughput"]["generate"]["sequences"] == 20
    assert picked(generate, "gpu_idle_share", "gpu_mean_utilisation") == (0.375, 0.5)
    assert [picked(one, "index", "idle_share", "peak_memory_bytes") for one in generate["gpus"]] == [
        (0, 0.25, 70),
        (1, 0.5, 80),
    ]
    assert between["gpu_idle_share"] == 1
    # 34 of 84 samples.
    assert picked(one, "gpu_idle_share", "gpu_mean_utilisation") == (0.404762, 0.47619)
    assert picked(found["before"], "seconds", *STARTS, "rest_seconds") == (4, 1, 0.5, 1, 0, 1.5, 2.5)
    total = found["total"]
    assert picked(total, "seconds", "between_seconds", *STARTS) == (54, 8, 2, 1, 4.5, 6, 11.5)
    assert total["start_up_share"] == 0.212963
    assert found["notes"] == []


def test_shares_add_up_to_one(log: Log) -> None:
    log.tell(0, "started")
    log.tell(0.1, "round", number=1)
    now = 0.1
    for number, stage in enumerate(STAGES):
        seconds = 1 / 3 + number / 7
        log.running(now + 0.013, stage)
        now += 0.013 + seconds
        log.done(now, stage, seconds)
    log.tell(now + 0.4, "finished")
    (one,) = profile(log.folder)["rounds"]
    shares = [part["share"] for part in (*one["stages"], one["between"])]
    assert len(shares) == 7
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    assert one["seconds"] == pytest.approx(now + 0.4 - 0.1, abs=2e-3)


def test_of_groups_side_by_side_the_slowest_counts(log: Log) -> None:
    log.tell(90, "started")
    log.tell(95, "round", number=1)
    log.running(100, "score")
    log.process(150, 1, 4, 5, 30, group=1)  # from 110
    log.process(155, 0.5, 1, 1.5, 1, group=1)  # group 1 again, from 151: 44 s in all
    log.process(158, 1, 5, 10, 30, group=2)  # from 112: 46 s
    log.process(160, 1, 2, 0, 55)  # who started them, and waited: from 102
    log.done(161, "score", 61)
    score = log.stages()["score"]
    assert picked(score, "groups", *STARTS) == (2, 4, 1 + 1, 2 + 5, 10, 19)
    assert picked(score, "work_seconds", "rest_seconds") == (55 - 16, 3)
    assert profile(log.folder)["notes"] == ["where groups work in parallel, start-up is that of the slowest"]


def test_groups_of_the_parent_itself(log: Log) -> None:
    log.tell(90, "started")
    log.tell(95, "round", number=1)
    log.running(100, "evaluate")
    log.process(110, 1, 2, 3, 4, group=1)  # from 100
    log.process(109, 1, 2, 2, 2, group=2)
    log.process(130, 1, 1, 1, 7, group=1)  # from 120: another step of the stage
    log.process(131, 1, 1, 2, 7, group=2)
    log.done(140, "evaluate", 40)
    found = log.stages()["evaluate"]
    assert picked(found, *STARTS, "work_seconds", "rest_seconds") == (4, 2, 3, 5, 10, 11, 19)


def test_rates_of_two_kinds_are_not_mixed(log: Log) -> None:
    log.tell(0, "started")
    log.tell(1, "round", number=1)
    log.running(2, "evaluate")
    log.tell(12, "throughput", stage="generate", tokens=50, seconds=10, sequences=5)
    # It began before the stage did, by its own clock; NaN is what Python's JSON can say and no other's.
    log.tell(14, "throughput", stage="score", tokens=120, seconds=14, sequences=5, flops=1, mfu=float("nan"))
    log.done(14, "evaluate", 12)
    found = log.stages()["evaluate"]
    assert picked(found, "tokens", "tokens_per_second", "mfu") == (None, None, None)
    assert {name: rate["tokens_per_second"] for name, rate in found["throughput"].items()} == {
        "generate": 5,
        "score": 10,
    }
    assert found["throughput"]["score"]["mfu"] is None


def resumed(log: Log) -> None:
    """Killed while it generated, failed while it scored, then finished."""
    log.tell(0, "started")
    log.tell(10, "round", number=1)
    log.running(12, "generate")
    log.process(15, 1, 1, 1, 0)
    log.tell(16, "throughput", stage="generate", tokens=10**9, seconds=1)
    log.tell(20, "shard", file="x")
    with (log.folder / "events.jsonl").open("a") as handle:
        handle.write(
            '{"time": 25, "event": "sha\n["no", "event"]\n{"event": "no time"}\n{"time": true, "event": "x"}\n'
        )
    log.tell(1000, "started")
    log.tell(1003, "round", number=1)
    log.running(1005, "generate")
    log.process(1025, 1, 2, 3, 13)
    log.done(1025, "generate", 20)
    log.running(1026, "score")
    log.tell(1030, "failed", text="x")
    log.tell(2000, "started")
    log.tell(2001, "round", number=1)
    log.tell(2002, "stage", stage="round-01/generate", status="kept", seconds=20, counts={})
    log.running(2003, "score")
    log.done(2013, "score", 10)
    log.tell(2014, "finished")


def test_a_resumed_run(log: Log) -> None:
    resumed(log)
    found = profile(log.folder)
    (one,) = found["rounds"]
    generate, score = one["stages"]
    # Of the killed attempt, what is known of: until its last event.
    assert picked(generate, "status", "attempts", "seconds", "lost_seconds") == ("done", 2, 20, 8)
    assert picked(generate, "processes", "start_up_seconds", "tokens") == (1, 6, None)
    assert picked(score, "status", "attempts", "seconds", "lost_seconds") == ("done", 2, 10, 4)
    # 2 in the first session, 2 + 1 in the second, 2 + 1 in the third.
    assert picked(one["between"], "seconds") == (8,)
    assert picked(one, "seconds", "lost_seconds") == (38, 12)
    assert found["before"]["seconds"] == 10 + 3 + 1
    assert picked(found["total"], "seconds", "lost_seconds", "processes") == (52, 12, 1)


def test_a_session_that_kept_everything_costs_nothing(log: Log) -> None:
    resumed(log)
    before = profile(log.folder)
    log.tell(3000, "started")
    log.tell(3500, "round", number=1)
    for stage in ("generate", "score"):
        log.tell(3600, "stage", stage=f"round-01/{stage}", status="kept", seconds=1, counts={})
    log.tell(4000, "finished")
    assert profile(log.folder) == before


def test_a_stage_that_is_not_done(log: Log) -> None:
    log.tell(0, "started")
    log.tell(1, "round", number=1)
    log.running(2, "generate")
    log.tell(9, "shard", file="x")
    generate = log.stages()["generate"]
    assert picked(generate, "status", "seconds", "share", *STARTS) == ("unfinished", 7, 0.875, *[None] * 5)
    assert profile(log.folder)["total"]["processes"] == 0


def test_a_run_from_before_the_figures(log: Log) -> None:
    for stage, seconds in (("generate", 30.0), ("score", 10.0)):
        log.manifest.record(f"round-01/{stage}", status="done", seconds=seconds)
    for told in (False, True):
        if told:  # by a version that said nothing of processes
            log.running(0, "score")
            log.process(5, 1, 1, 1, 1)
            log.done(10, "score", 10.0)
        found = profile(log.folder)
        (one,) = found["rounds"]
        assert [picked(stage, "seconds", "share") for stage in one["stages"]] == [(30, 0.75), (10, 0.25)]
        for part in (one, *one["stages"], found["total"]):
            assert picked(part, *STARTS, "gpus") == (None,) * 6
        assert (one["between"], found["before"]) == (None, None)
        assert found["notes"] == [
            "start-up, GPUs and throughput are unknown: an older version, which did not record them, made this run"
        ]
    log.tell(100, "started")
    log.tell(101, "round", number=1)
    log.running(102, "score")
    log.done(104, "score", 2)
    assert picked(log.stages()["generate"], "seconds", "attempts", "processes") == (30, None, None)
    assert picked(log.stages()["score"], "seconds", "attempts", "processes") == (2, 1, 0)
    assert profile(log.folder)["notes"] == [
        "where values are missing, an older version, which did not record them, made the stage"
    ]


def test_a_clock_that_is_set_back(log: Log) -> None:
    log.tell(1000, "started")
    log.tell(1001, "round", number=1)
    log.running(500, "generate")
    log.done(510, "generate", 10)
    log.tell(511, "finished")
    (one,) = profile(log.folder)["rounds"]
    assert picked(one, "seconds") == (11,)


def test_a_profile_is_written_once_a_stage_has_begun(log: Log) -> None:
    write_profile(log.folder)
    assert not (log.folder / "profile.json").exists()
    one_round(log)
    write_profile(log.folder)
    assert read_json(log.folder / "profile.json") == profile(log.folder)


# --- what a person sees -------------------------------------------------------------------------------------


@pytest.fixture
def dice(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Calls `dice …` and returns (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(sys, "argv", ["dice", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capfd.readouterr()

    return call


def test_the_table(dice, log: Log) -> None:
    one_round(log)
    code, out, err = dice("status", log.folder, "--profile")
    assert (code, err) == (0, "")
    title, *lines = out.splitlines()
    assert title == f"{log.folder}: stopped"
    assert [re.sub("  +", "|", line) for line in lines] == [
        re.sub("  +", "|", line)
        for line in (
            "                           time  share    start-up  load   work    GPU idle  tokens/s  MFU",
            "before the rounds         4.0 s  –        1.5 s     0.0 s  0.0 s   –         –         –",
            "round-01/generate        40.0 s  80.0 %   4.0 s     6.0 s  29.5 s  37.5 %    100.0     28.6 %",
            "round-01/mine             2.0 s  4.0 %    0.0 s     0.0 s  2.0 s   –         –         –",
            "round-01, between stages  8.0 s  16.0 %   0.0 s     0.0 s  8.0 s   100.0 %   –         –",
            "round-01                 50.0 s  100.0 %  4.0 s     6.0 s  39.5 s  40.5 %    –         –",
            "all                      54.0 s  –        5.5 s     6.0 s  39.5 s  40.5 %    –         –",
            "start-up costs: 2 processes, 11.5 s, 21.3 % of the run (spawn 1.0 s, import 4.5 s, load 6.0 s)",
        )
    ]


def test_what_stands_below_the_table(dice, log: Log) -> None:
    resumed(log)
    log.tell(3000, "started")
    log.tell(3001, "round", number=1)
    log.tell(3001, "gpu", stage=None, gpus=[], text="no GPU seen: nvidia-smi is not installed")
    log.running(3001, "mine")
    code, out, _ = dice("status", log.folder, "--profile")
    assert code == 0
    assert re.search(r"^round-01/mine \(unfinished\) +0\.0 s +0\.0 % +– +– +– +– +– +–$", out, flags=re.M)
    assert out.splitlines()[-4:] == [
        "round-01/generate: 8.0 s more in earlier attempts (1)",
        "round-01/score: 4.0 s more in earlier attempts (1)",
        "no GPU seen: nvidia-smi is not installed",
        "start-up costs: 1 process, 6.0 s, 11.3 % of the run (spawn 1.0 s, import 2.0 s, load 3.0 s)",
    ]


def test_one_object_of_json(dice, log: Log) -> None:
    one_round(log)
    before = sorted(path.name for path in log.folder.iterdir())
    code, out, err = dice("status", log.folder, "--profile", "--json")
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 1
    assert json.loads(out) == {"run": str(log.folder), "state": "stopped", **profile(log.folder)}
    assert sorted(path.name for path in log.folder.iterdir()) == before


def test_a_run_that_has_none(dice, log: Log) -> None:
    code, out, _ = dice("status", log.folder, "--profile")
    assert (code, out) == (0, f"{log.folder}: stopped, and no stage has begun: there is no profile yet\n")
    found = json.loads(dice("status", log.folder, "--profile", "--json")[1])
    assert (found["rounds"], found["total"]["seconds"], found["total"]["start_up_share"]) == ([], 0, None)
    log.manifest.record("round-01/generate", status="done", seconds=30.0)
    code, out, _ = dice("status", log.folder, "--profile")
    assert code == 0
    assert re.search(r"^round-01/generate +30\.0 s +100\.0 % +– +– +– +– +– +–$", out, flags=re.M)
    assert out.splitlines()[-1].endswith("an older version, which did not record them, made this run")


def test_a_profile_without_a_run(dice, tmp_path: Path) -> None:
    code, out, err = dice("status", "--profile", "--json")
    assert (code, out) == (2, "")
    assert err == "error: --profile is of one run: name its folder (dice status RUN --profile)\n"
    code, out, err = dice("status", tmp_path, "--profile")
    assert (code, out) == (2, "")
    assert "holds no run (no config.yaml)" in err


def test_these_events_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with Display() as show:
        for event in ("started", "process", "throughput", "gpu", "group", "advance"):
            show(event, stage="score", text="x", number=1, seconds={}, status="dead")
    assert capsys.readouterr() == ("", "")


# --- how a run records it -----------------------------------------------------------------------------------


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
