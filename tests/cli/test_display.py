"""What a person sees of a run: plain lines, or bars with rates and time left on a terminal."""

from __future__ import annotations

import re

import pytest

from cli import progress
from cli.progress import Display
from cli.tables import metrics_table, mining_table, print_table, status_table

MINED = {
    "pairs": 1200,
    "alpha": 0.0125,
    "alpha_low": 0.0124,
    "alpha_high": None,
    "mean_length_gap_before": 12.5,
    "mean_length_gap_after": 0.25,
    "chosen_longer_share": 0.485,
    "reward_length_correlation_before": 0.625,
    "reward_length_correlation_after": -0.125,
    "margin_quantiles": {"min": 0.0, "0.05": 0.25, "0.25": 0.5, "0.5": 1.0, "0.75": 2.0, "0.95": 4.0, "max": 8.5},
    "mean_consistency": None,
    "dropped": {"truncated": 1034, "duplicate": 0, "too_few_responses": 2},
    "dropped_prompts": {"no_contrast": 7},
    "dropped_pairs": {"below_min_margin": 0, "below_quantile": 0},
    "prompts": 1300,
    "rows": 10400,
}
"""Counts of mining; the numbers are made up."""

DONE = {
    "stage": "round-01/generate",
    "status": "done",
    "seconds": 83.2,
    "counts": {"responses": 4800, "cut_off": 3},
}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the test sets: `clock[0]` is now."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Display() as show:
        show("round", number=1, rounds=2)
        show("stage", stage="round-01/generate", status="running")
        show("note", text="engine: transformers (auto: no GPU is used) [not markup]")
        show("warning", round=1, stage="generate", name="cut_off_share", value=0.8, limit=0.1, text="raise [it]")
        for seconds, done in ((0.0, 100), (5.0, 200), (10.0, 300), (12.0, 400), (20.0, 500)):
            clock[0] = 100.0 + seconds
            show("progress", stage="generate", done=done, total=1000, unit="responses")
        show("shard", file="x", key="y", rows=3)
        show("stage", **DONE)
        show("stage", **{**DONE, "status": "kept"})
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "round 1 of 2",
        "  engine: transformers (auto: no GPU is used) [not markup]",
        "  warning: raise [it]",
        "  generate: 300/1,000 responses, 20.0/s, 35.0 s left",
        "  generate: 500/1,000 responses, 20.0/s, 25.0 s left",
        "  generate   1 min 23 s  responses 4,800, cut off 3",
        "  generate         kept  responses 4,800, cut off 3",
    ]


def test_the_rate_leaves_out_what_was_kept(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Display() as show:
        show("progress", stage="score", done=900, total=1000, unit="sequences")  # whole shards of before
        clock[0] += 20.0
        show("progress", stage="score", done=920, total=1000, unit="sequences")
    assert capsys.readouterr().err == "  score: 920/1,000 sequences, 1.0/s, 1 min 20 s left\n"


def test_a_count_that_falls_is_of_another_pass(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Display() as show:
        for done in (1, 1600, 400, 500):  # the second model of an evaluation begins again
            clock[0] += 20.0
            show("progress", stage="generate", done=done, total=1600, unit="responses")
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "  generate: 500/1,600 responses, 5.0/s, 3 min 40 s left"
    assert "-" not in "".join(lines)


def test_bars_on_a_terminal(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    with Display() as show:
        assert show.progress is not None
        show("stage", stage="round-01/train", status="running")
        show.progress.refresh()
        show("progress", stage="train", done=0, total=40, unit="steps")
        clock[0] += 10.0
        show("progress", stage="train", done=20, total=40, unit="steps")
        show.progress.refresh()
        show("stage", **{**DONE, "stage": "round-01/train", "counts": {"steps": 40}})
        assert not show.progress.tasks
    out, err = capsys.readouterr()
    assert out == ""
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", err)
    assert re.search(r"train .* starting", text)
    assert re.search(r"train .* 20/40 steps, 2\.0/s, 10\.0 s left", text)
    assert "  train      1 min 23 s  steps 40" in text


def test_tables_are_complete_lines_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    rounds = {
        f"round-{n:02d}": {"oracle_win_rate": 0.5 + n / 100, "oracle_win_rate_ci95": [0.5, 0.6]} for n in range(9)
    }
    rounds["round-08"]["only_here"] = [1.0]
    print_table(metrics_table(rounds))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "on held-out prompts and pairs"
    assert lines[1].split() == list(rounds)
    assert re.fullmatch(r"oracle win rate +0\.5 \(0\.5 to 0\.6\) +0\.51 .* 0\.58 \(0\.5 to 0\.6\)", lines[2])
    assert lines[3].split() == ["only", "here", *["–"] * 8, "1"]
    assert lines == [line.rstrip() for line in lines]


# Mining


def test_rows_of_mining_by_step(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Display() as show:
        show("stage", stage="mine", status="running")
        for seconds, step, done in ((0.0, "scan", 100), (10.0, "scan", 1000), (20.0, "pairs", 0), (30.0, "pairs", 500)):
            clock[0] = 100.0 + seconds
            show("progress", stage="mine", step=step, done=done, total=1000)
        show("progress", stage="mine", done=1000, total=1000)
    # The rate of a step is of that step alone.
    assert capsys.readouterr().err.splitlines() == [
        "  mine (scan): 1,000/1,000 rows, 90.0/s",
        "  mine (pairs): 500/1,000 rows, 50.0/s, 10.0 s left",
    ]


SHOWN = (
    "pairs 1,200, alpha 0.0125, mean length gap 12.5 to 0.25, length correlation 0.625 to -0.125, "
    "chosen longer 48.5 %, margin 1 (0.25 to 4)"
)


def test_a_line_of_mining(capsys: pytest.CaptureFixture[str]) -> None:
    with Display() as show:
        show("stage", stage="round-01/mine", status="done", seconds=1.0, counts=MINED)
        # Of a run that an older version mined.
        show("stage", stage="round-01/mine", status="kept", counts={"pairs": 3, "alpha": 0.5})
    assert capsys.readouterr().err.splitlines() == [
        f"  mine            1.0 s  {SHOWN}",
        "  mine             kept  pairs 3, alpha 0.5",
    ]


def test_the_status_of_mining(capsys: pytest.CaptureFixture[str]) -> None:
    entry = {"stage": "round-01/mine", "status": "done", "seconds": 1.0, "counts": MINED}
    print_table(status_table({"run": "r", "state": "stopped", "done": 1, "stages": 6, "entries": [entry]}))
    assert capsys.readouterr().out.splitlines()[-1].endswith(SHOWN)


def test_the_table_of_mining(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(mining_table(MINED, "pairs.parquet"))
    lines = [re.sub("  +", "|", line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "pairs in pairs.parquet",
        "pairs|1,200 (of 1,300 prompts with 10,400 responses)",
        "alpha|0.0125 (the same pairs from 0.0124 to infinity)",
        "mean length gap|12.5 before, 0.25 after",
        "correlation of reward and length|0.625 before, -0.125 after",
        "chosen is the longer|48.5 %",
        "margins|min: 0, 5 %: 0.25, 25 %: 0.5, 50 %: 1, 75 %: 2, 95 %: 4, max: 8.5",
        "dropped rows|truncated 1,034, too few responses 2",
        "dropped prompts|no contrast 7",
    ]
    nothing = dict.fromkeys(MINED["margin_quantiles"])
    more = {"alpha": None, "chosen_longer_share": None, "margin_quantiles": nothing, "mean_consistency": 0.75}
    print_table(mining_table(MINED | more, "pairs.parquet"))
    lines = [re.sub("  +", "|", line) for line in capsys.readouterr().out.splitlines()]
    assert {"chosen is the longer|–", "margins|–", "mean consistency|0.75"} <= set(lines)
    assert not [line for line in lines if line.startswith("alpha")]
