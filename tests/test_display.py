"""What a person sees of a run: plain lines, or bars with rates and time left on a terminal."""

from __future__ import annotations

import re

import pytest

from cli import display
from cli.display import Display, metrics_table, print_table

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
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Display() as show:
        show("round", number=1, rounds=2)
        show("stage", stage="round-01/generate", status="running")
        show("note", text="engine: transformers (auto: no GPU is used) [not markup]")
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


def test_tables_are_whole_lines_without_a_terminal(
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
    assert re.fullmatch(r"oracle win rate +0\.5 +0\.51 .* 0\.58", lines[2])
    assert lines[4].split() == ["only", "here", *["–"] * 8, "1"]
    assert lines == [line.rstrip() for line in lines]
