"""Which stages of a run share a process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from damage import prepare_nothing

from dice_py.compute.stage_process import WarmPool
from dice_py.compute.worker import work_name
from dice_py.config.run import RunConfig
from dice_py.runs import folder as run_folder
from dice_py.runs import loop

pytestmark = pytest.mark.slow


class Process:
    """In place of a `Worker`: its stages run in this process."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.alive = True

    def is_alive(self) -> bool:
        return self.alive

    def stop(self) -> None:
        self.alive = False


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[Process]:
    """The processes of a run, in order of their start."""
    started: list[Process] = []

    def run_here(work: Any, *, report: Any, warm: Process | None = None, keep: Any = None, **_: Any) -> Any:
        if warm is None:
            started.append(Process())
        process = warm or started[-1]
        # What stays holds a model: nothing else begins beside it.
        assert not any(other.alive for other in started if other is not process)
        process.stages.append(work_name(work).partition(":")[2])
        result = work(report=report)
        if keep is None:
            process.stop()
        else:
            keep(process)
        return result

    monkeypatch.setattr(run_folder, "run_in_subprocess", run_here)
    monkeypatch.setattr(WarmPool, "prepare", prepare_nothing)
    return started


def test_score_replay_and_inspect_share_one(config: RunConfig, processes: list[Process], tmp_path: Path) -> None:
    loop.run(config, tmp_path / "run")
    shared = ["ScoreJob", "ReplayJob", "InspectJob"]
    expected = [["PreflightJob"], ["GenerateJob"], shared, ["TrainJob"], ["EvaluateJob"]]
    assert [process.stages for process in processes] == expected
    assert not any(process.alive for process in processes)


def test_a_stage_that_needs_no_process_is_passed_by(
    config: RunConfig, processes: list[Process], tmp_path: Path
) -> None:
    without = config.model_copy(update={"report": config.report.model_copy(update={"token_credit": False})})
    loop.run(without, tmp_path / "run")
    expected = [["PreflightJob"], ["GenerateJob"], ["ScoreJob", "ReplayJob"], ["TrainJob"], ["EvaluateJob"]]
    assert [process.stages for process in processes] == expected


def test_a_run_in_this_process_starts_none_and_leaves_no_figures_for_a_plan(
    config: RunConfig, processes: list[Process], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It works beside others, on other threads than a run of its own has."""
    remembered: list[Path] = []
    monkeypatch.setattr(loop, "remember_run", remembered.append)
    loop.run(config, tmp_path / "here", in_process=True)
    assert (processes, remembered) == ([], [])
    loop.run(config, tmp_path / "run")
    assert processes
    assert remembered == [tmp_path / "run"]
