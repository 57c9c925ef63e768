"""`dice status --profile`: a run's profile as a user sees it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from event_log import Log, one_round, resumed

from cli.progress import Display
from dice_py.runs.profile import profile


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "run")


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
    log.event(3000, "started")
    log.event(3001, "round", number=1)
    log.event(3001, "gpu", stage=None, gpus=[], text="no GPU seen: there is no NVIDIA driver")
    log.running(3001, "mine")
    code, out, _ = dice("status", log.folder, "--profile")
    assert code == 0
    assert re.search(r"^round-01/mine \(unfinished\) +0\.0 s +0\.0 % +– +– +– +– +– +–$", out, flags=re.M)
    assert out.splitlines()[-4:] == [
        "round-01/generate: 8.0 s more in earlier attempts (1)",
        "round-01/score: 4.0 s more in earlier attempts (1)",
        "no GPU seen: there is no NVIDIA driver",
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
