"""A run whose training cannot fit stops before it samples, and its plan says the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dice_py.config.run import RunConfig
from dice_py.errors import OutOfMemoryError
from dice_py.planning.plan import plan
from dice_py.runs import inputs, loop
from dice_py.runs.folder import Run
from dice_py.runs.measured_costs import ResponseLengths
from dice_py.stages.job import Job, StageResult
from dice_py.stages.preflight import PreflightJob
from dice_py.training import memory_check


class SampledError(Exception):
    """The run got past its checks."""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Its free memory and the memory that a process takes; the check runs in this process, and nothing else does."""
    memory = {"free": 10**12, "base": 10**6}
    monkeypatch.setattr(memory_check, "free_host_memory", lambda: memory["free"])
    monkeypatch.setattr(memory_check, "resident_memory", lambda name: memory["base"])

    def spawn(self: Run, job: Job, folder: Path, **_: Any) -> StageResult:
        if isinstance(job, PreflightJob):
            return job.run(self.report)
        raise SampledError

    monkeypatch.setattr(Run, "spawn", spawn)
    return memory


def message(config: RunConfig, folder: Path) -> str:
    with pytest.raises(OutOfMemoryError) as caught:
        loop.run(config, folder)
    assert caught.value.exit_code == 4
    assert not list(folder.glob("round-01/generate/*.parquet"))
    return str(caught.value)


def test_run_and_plan_refuse_alike(config: RunConfig, tmp_path: Path, machine: dict[str, int]) -> None:
    with pytest.raises(SampledError):
        loop.run(config, tmp_path / "fits")
    machine["free"] = 2 * 2**20
    refused = message(config, tmp_path / "refused")
    assert "train needs" in refused
    assert "0.00 GiB are free" in refused
    with pytest.raises(OutOfMemoryError) as planned:
        plan(config, tmp_path / "planned")
    assert str(planned.value) == refused
    assert "--force" in refused
    notes: list[str] = []
    with pytest.raises(SampledError):
        loop.resume(tmp_path / "refused", lambda event, **fields: notes.append(str(fields.get("text"))), force=True)
    assert any(note.startswith("warning: train needs") for note in notes)
    with pytest.raises(SampledError):  # a run that was forced once is not stopped by its check again
        loop.resume(tmp_path / "refused")
    machine["free"] = 10**12  # another machine, or after other programs have ended
    with pytest.raises(SampledError):
        loop.resume(tmp_path / "refused")


def test_lengths_that_a_plan_has_sampled_count(
    config: RunConfig, tmp_path: Path, machine: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine["free"] = 40 * 2**20
    with pytest.raises(SampledError):
        loop.run(config, tmp_path / "fits")
    lengths = ResponseLengths(lengths=[3, 40_000, 5], usable=1.0, cut_off=0.0)
    monkeypatch.setattr(inputs, "recall_lengths", lambda key: lengths)
    assert "train needs" in message(config, tmp_path / "refused")
