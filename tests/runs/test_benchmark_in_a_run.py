"""`evaluate.command` in a run: its numbers are in the metrics, the report and the choice of a round; failures warn."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from damage import notes
from faked_stages import faked_stages
from own_run import Events
from report_page import Page, text

from dice_py.config.loading import resolve
from dice_py.config.rounds import RoundsConfig
from dice_py.config.run import RunConfig
from dice_py.config.stages import EvaluateConfig
from dice_py.errors import UsageError
from dice_py.reporting.html import write_report
from dice_py.runs import loop
from dice_py.runs.status import run_status
from dice_py.runs.stored_config import with_absolute_paths
from dice_py.storage.files import Manifest

BENCH = """
import json, pathlib, sys
number = sys.argv[-1].split("round-")[1][:2]
values = json.loads(pathlib.Path("values.json").read_text())
value = values[number]
if isinstance(value, str):
    sys.exit(value)
print(json.dumps({"score": value}))
"""


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the program is in; it prints what values.json has for the round."""
    folder = tmp_path / "bench"
    folder.mkdir()
    (folder / "bench.py").write_text(BENCH)
    faked_stages(monkeypatch)
    monkeypatch.chdir(folder)
    return folder


def with_command(config: RunConfig, **rounds: Any) -> RunConfig:
    evaluate = config.evaluate.model_copy(update={"command": [sys.executable, "bench.py"]})
    return config.model_copy(update={"evaluate": evaluate, "rounds": RoundsConfig(**rounds)})


def give(bench: Path, **values: float | str) -> None:
    (bench / "values.json").write_text(json.dumps({name.removeprefix("r"): value for name, value in values.items()}))


def test_its_numbers_choose_the_round(config: RunConfig, bench: Path, tmp_path: Path) -> None:
    give(bench, r01=0.5, r02=0.75, r03=0.25)
    folder, events = tmp_path / "run", Events()
    chosen = with_command(config, count=3, keep="best", metric="command.score")
    metrics = loop.run(chosen, folder, events, after_round=write_report)
    assert [values["command.score"] for values in metrics.values()] == [0.5, 0.75, 0.25]
    finished = next(fields for event, fields in events.events if event == "finished")
    assert finished["round"] == "round-02"
    assert any("the best by command.score (0.75); round-03 has 0.25" in note for note in notes(events))
    status = run_status(folder)
    assert [entry["stage"] for entry in status["entries"]][7] == "round-01/benchmark"
    assert status["state"] == "finished"
    page = Page(folder / "report.html")
    assert page.table("on held-out prompts and pairs")["command.score"] == ["0.5", "0.75", "0.25"]
    assert page.plots()["command.score"] == (
        "command.score by round, with 95 % intervals. 0.5 after round 1, 0.25 after round 3."
    )
    assert "round-02: command.score 0.75" in map(text, page.all("p"))
    # From another folder, nothing is made again: the program's folder is the run's.
    events = Events()
    loop.resume(folder, events)
    assert {status for _, status in events.stages()} == {"kept"}


def test_a_failure_is_a_warning_and_a_resume_tries_again(
    config: RunConfig, bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(bench, r01=0.5, r02="no such task")
    folder, events = tmp_path / "run", Events()
    metrics = loop.run(with_command(config, count=2, keep="best", metric="command.score"), folder, events)
    assert "command.score" not in metrics["round-02"]
    (warning,) = [fields for event, fields in events.events if event == "warning" and fields["stage"] == "benchmark"]
    assert (warning["name"], warning["round"]) == ("benchmark_failure", 2)
    assert "no such task" in warning["text"]
    assert any("round 2 has no command.score" in note for note in notes(events))
    assert next(fields for event, fields in events.events if event == "finished")["round"] == "round-01"
    give(bench, r01=0.5, r02=0.9)
    monkeypatch.chdir(tmp_path)
    events = Events()
    metrics = loop.resume(folder, events)
    assert metrics["round-02"]["command.score"] == 0.9
    assert [stage for stage, status in events.stages() if status == "done"] == ["round-02/benchmark"]
    assert next(fields for event, fields in events.events if event == "finished")["round"] == "round-02"
    assert Manifest(folder / "manifest.json").stage("round-02/benchmark")["warnings"] == []


def test_no_round_has_the_number(config: RunConfig, bench: Path, tmp_path: Path) -> None:
    give(bench, r01="broken", r02="broken")
    events = Events()
    loop.run(with_command(config, count=2, keep="best", metric="command.score"), tmp_path / "run", events)
    assert next(fields for event, fields in events.events if event == "finished")["round"] == "round-02"  # the last


def test_a_program_that_is_not_there_stops_the_run_first(config: RunConfig, bench: Path, tmp_path: Path) -> None:
    absent = config.model_copy(update={"evaluate": EvaluateConfig(command=["./absent"])})
    with pytest.raises(UsageError, match=r"no program ./absent"):
        loop.run(absent, tmp_path / "run", Events())
    assert not list((tmp_path / "run").glob("round-*"))


def test_the_command_in_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = resolve([], ["evaluate.command=lm_eval --model 'hf x' {model}"])
    assert config.evaluate.command == ["lm_eval", "--model", "hf x", "{model}"]
    assert with_absolute_paths(config).evaluate.command_folder == str(tmp_path)
    assert with_absolute_paths(resolve([], [])).evaluate.command_folder is None
    for value, said in (
        ("[]", "names no program"),
        ('[""]', "names no program"),
        ('["a\\0"]', "NUL"),
        ("'\"a'", "quot"),
        ("{a: b}", "as a text, or as a list"),
        ("3", "as a text, or as a list"),
    ):
        with pytest.raises(UsageError, match=said):
            resolve([], [f"evaluate.command={value}"])


def test_metrics_that_a_run_does_not_measure() -> None:
    for metric, said in (
        ("command.score", "evaluate.command is not set"),
        ("openai_win_rate", "evaluate.judges.openai is not set"),
        ("reward_model_win_rate", "evaluate.judges.reward_model is not set"),
        ("command.", "or command.NAME"),
        ("kl_to_start", "or command.NAME"),
    ):
        with pytest.raises(UsageError, match=said):
            resolve([], [f"rounds.metric={metric}"])
    with pytest.raises(UsageError, match="one number a round"):
        resolve([], ["rounds.metric=command.a", "rounds.stop_when=worse", "evaluate.command=x"])
    assert resolve([], ["rounds.metric=command.a", "evaluate.command=x"]).round_metric == "command.a"
