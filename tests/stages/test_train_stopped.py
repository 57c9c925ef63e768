"""A training that is asked to stop: its checkpoint is of the step that it made last, and it goes on from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from tiny_training import Stage

from dice_py.errors import StoppedTrainingError
from dice_py.training import stopping
from dice_py.training.checkpoints import is_trained

pytestmark = pytest.mark.slow


@pytest.fixture
def run(llama: Path, pairs: pl.DataFrame, tmp_path: Path) -> Stage:
    return Stage(llama, pairs, tmp_path)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """With anything in it, this process was asked."""
    requests: set[str] = set()
    monkeypatch.setattr(stopping, "is_asked_to_stop", lambda: bool(requests))
    return requests


@pytest.mark.parametrize("save_steps", [None, 2])
def test_it_goes_on_from_the_step_that_it_stopped_after(
    run: Stage, asked: set[str], tmp_path: Path, save_steps: int | None
) -> None:
    undisturbed = Stage(run.policy, run.pairs, tmp_path / "undisturbed")
    undisturbed.folder.mkdir()
    want = undisturbed(save_steps=save_steps, logging_steps=2)

    run.on_step = lambda step: asked.add("now") if step == 3 else None
    with pytest.raises(StoppedTrainingError, match=r"has written its checkpoint of step 3 of 6"):
        run(save_steps=save_steps, logging_steps=2)
    checkpoint = run.out / "checkpoints/checkpoint-3"
    # The report of a step comes before the stop is decided: after that very step, and not a later one.
    assert is_trained(checkpoint, run.job(save_steps=save_steps, logging_steps=2).key())
    assert not run.model.exists()

    asked.clear()
    counts = run(save_steps=save_steps, logging_steps=2)
    assert run.steps() == [4, 5, 6]
    assert all(torch.equal(tensor, undisturbed.weights()[name]) for name, tensor in run.weights().items())
    rounded: dict[str, Any] = {
        name: pytest.approx(value, rel=1e-6) for name, value in want.items() if name != "saved_dtype"
    }
    assert counts == rounded | {"saved_dtype": want["saved_dtype"]}
    assert not checkpoint.parent.exists()


def test_asked_before_its_first_step_it_makes_none(run: Stage, asked: set[str]) -> None:
    asked.add("before")
    with pytest.raises(StoppedTrainingError, match="interrupted before step 1 of the training"):
        run()
    assert run.steps() == []
    asked.clear()
    run(max_steps=1)
    assert run.steps() == [1]


def test_asked_at_its_last_step_it_ends(run: Stage, asked: set[str]) -> None:
    run.on_step = lambda step: asked.add("late") if step == 2 else None
    assert run(max_steps=2)["steps"] == 2
    assert not (run.out / "checkpoints").exists()
