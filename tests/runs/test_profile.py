"""A run's profile: values worked out by hand from made-up events."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from event_log import STARTS, Log, one_round, picked, resumed

from dice_py.runs.profile import profile, write_profile
from dice_py.stages.registry import ROUND_STAGES
from dice_py.storage.files import read_json


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "run")


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
    log.event(0, "started")
    log.event(0.1, "round", number=1)
    now = 0.1
    for number, stage in enumerate(ROUND_STAGES):
        seconds = 1 / 3 + number / 7
        log.running(now + 0.013, stage)
        now += 0.013 + seconds
        log.done(now, stage, seconds)
    log.event(now + 0.4, "finished")
    (one,) = profile(log.folder)["rounds"]
    shares = [part["share"] for part in (*one["stages"], one["between"])]
    assert len(shares) == len(ROUND_STAGES) + 1
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    assert one["seconds"] == pytest.approx(now + 0.4 - 0.1, abs=2e-3)


def test_of_groups_side_by_side_the_slowest_counts(log: Log) -> None:
    log.event(90, "started")
    log.event(95, "round", number=1)
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
    log.event(90, "started")
    log.event(95, "round", number=1)
    log.running(100, "evaluate")
    log.process(110, 1, 2, 3, 4, group=1)  # from 100
    log.process(109, 1, 2, 2, 2, group=2)
    log.process(130, 1, 1, 1, 7, group=1)  # from 120: another step of the stage
    log.process(131, 1, 1, 2, 7, group=2)
    log.done(140, "evaluate", 40)
    found = log.stages()["evaluate"]
    assert picked(found, *STARTS, "work_seconds", "rest_seconds") == (4, 2, 3, 5, 10, 11, 19)


def test_rates_of_two_kinds_are_not_mixed(log: Log) -> None:
    log.event(0, "started")
    log.event(1, "round", number=1)
    log.running(2, "evaluate")
    log.event(12, "throughput", stage="generate", tokens=50, seconds=10, sequences=5)
    # It began before the stage did, by its own clock; NaN is what Python's JSON can say and no other's.
    log.event(14, "throughput", stage="score", tokens=120, seconds=14, sequences=5, flops=1, mfu=float("nan"))
    log.done(14, "evaluate", 12)
    found = log.stages()["evaluate"]
    assert picked(found, "tokens", "tokens_per_second", "mfu") == (None, None, None)
    assert {name: rate["tokens_per_second"] for name, rate in found["throughput"].items()} == {
        "generate": 5,
        "score": 10,
    }
    assert found["throughput"]["score"]["mfu"] is None


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
    log.event(3000, "started")
    log.event(3500, "round", number=1)
    for stage in ("generate", "score"):
        log.event(3600, "stage", stage=f"round-01/{stage}", status="kept", seconds=1, counts={})
    log.event(4000, "finished")
    assert profile(log.folder) == before


def test_a_stage_that_is_not_done(log: Log) -> None:
    log.event(0, "started")
    log.event(1, "round", number=1)
    log.running(2, "generate")
    log.event(9, "shard", file="x")
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
    log.event(100, "started")
    log.event(101, "round", number=1)
    log.running(102, "score")
    log.done(104, "score", 2)
    assert picked(log.stages()["generate"], "seconds", "attempts", "processes") == (30, None, None)
    assert picked(log.stages()["score"], "seconds", "attempts", "processes") == (2, 1, 0)
    assert profile(log.folder)["notes"] == [
        "where values are missing, an older version, which did not record them, made the stage"
    ]


def test_a_clock_that_is_set_back(log: Log) -> None:
    log.event(1000, "started")
    log.event(1001, "round", number=1)
    log.running(500, "generate")
    log.done(510, "generate", 10)
    log.event(511, "finished")
    (one,) = profile(log.folder)["rounds"]
    assert picked(one, "seconds") == (11,)


def test_a_profile_is_written_once_a_stage_has_begun(log: Log) -> None:
    write_profile(log.folder)
    assert not (log.folder / "profile.json").exists()
    one_round(log)
    write_profile(log.folder)
    assert read_json(log.folder / "profile.json") == profile(log.folder)
