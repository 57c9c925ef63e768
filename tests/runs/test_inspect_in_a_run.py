"""The stage inspect in a run: what makes it again, and that its failure is a warning, not the end of the run.

No model is run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from faked_stages import faked_stages
from own_run import STAGE_NAMES, Events

from dice_py.config.run import RunConfig
from dice_py.errors import (
    DamagedError,
    DataError,
    DiceError,
    DiskFullError,
    InterruptedRunError,
    OutOfMemoryError,
)
from dice_py.runs import loop
from dice_py.runs.folder import Run
from dice_py.runs.status import run_status
from dice_py.stages.inspect import InspectJob
from dice_py.stages.job import Job, StageResult
from dice_py.storage.files import read_json

NAME = "round-01/inspect"


def made_again(events: Events) -> list[str]:
    return [stage for stage, status in events.stages() if status == "done"]


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """The stage fails, once the others are faked."""
    spawn = Run.spawn

    def fails(self: Run, job: Job, folder: Path, **options: Any) -> StageResult:
        if isinstance(job, InspectJob):
            raise error
        return spawn(self, job, folder, **options)

    monkeypatch.setattr(Run, "spawn", fails)


@pytest.mark.parametrize(
    "error",
    [
        OutOfMemoryError("out of memory: the worker of this stage was killed by the kernel"),
        DataError("the tokens are of another model"),
        RuntimeError("a stage failed; its log is worker.log\nTraceback …"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_failure_is_a_warning_until_a_resume_mends_it(
    config: RunConfig, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, events = tmp_path / "run", Events()
    faked_stages(monkeypatch)
    with monkeypatch.context() as patch:
        failing(patch, error)
        loop.run(config, folder, events)
    assert made_again(events) == STAGE_NAMES  # those after it too
    (warning,) = [fields for event, fields in events.events if event == "warning" and fields["stage"] == "inspect"]
    assert warning["name"] == "inspect_failure"
    assert str(error) in warning["text"]
    entry = read_json(folder / "manifest.json")["stages"][NAME]
    assert (entry["files"], entry["counts"]["failure"]) == ([], f"{type(error).__name__}: {error}")
    assert run_status(folder)["state"] == "finished"
    # A resume makes it alone.
    events = Events()
    loop.resume(folder, events)
    assert made_again(events) == [NAME]
    assert "failure" not in read_json(folder / "manifest.json")["stages"][NAME]["counts"]
    events = Events()
    loop.resume(folder, events)
    assert made_again(events) == []


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (DiskFullError("no room left on the disk"), DiskFullError),
        (InterruptedRunError("interrupted"), InterruptedRunError),
        (DamagedError("mining.json is damaged"), DamagedError),
    ],
    ids=["disk", "interrupted", "damaged"],
)
def test_what_is_not_of_its_work_ends_the_run(
    config: RunConfig, error: DiceError, raised: type[DiceError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faked_stages(monkeypatch)
    failing(monkeypatch, error)
    with pytest.raises(raised):
        loop.run(config, tmp_path / "run")
    assert [entry["status"] for entry in run_status(tmp_path / "run")["entries"]] == [
        *["done"] * 4, "stopped", "to do", "to do"
    ]  # fmt: skip


@pytest.mark.parametrize("setting", ["report.pairs=7", "report.token_credit=false"])
def test_a_setting_of_the_report_makes_it_alone_again(
    config: RunConfig, setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faked_stages(monkeypatch)
    loop.run(config, tmp_path / "run")
    events = Events()
    loop.resume(tmp_path / "run", events, assignments=[setting])
    assert made_again(events) == [NAME]
    notes = [fields["text"] for event, fields in events.events if event == "note"]
    name, _, value = setting.partition("=")
    assert any(
        note.startswith(f"{NAME} is made again") and f"{name}: " in note and value in note.lower() for note in notes
    )


def test_a_round_keeps_no_pairs(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With report.pairs=0 the file of pairs is not missed."""
    faked_stages(monkeypatch)
    spawn = Run.spawn

    def only_distributions(self: Run, job: Job, folder: Path, **options: Any) -> StageResult:
        result = spawn(self, job, folder, **options)
        if not isinstance(job, InspectJob):
            return result
        job.pairs_file.unlink()
        return StageResult([(job.distributions_file, job.key())], {"pairs": 0})

    monkeypatch.setattr(Run, "spawn", only_distributions)
    none = config.model_copy(update={"report": config.report.model_copy(update={"pairs": 0})})
    loop.run(none, tmp_path / "run")
    events = Events()
    loop.resume(tmp_path / "run", events)
    assert made_again(events) == []
