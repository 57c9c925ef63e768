"""Damaged files of checkpoints and of trained models: noticed, said so, and trained again from what is whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from damage import DAMAGE, empty, flip, truncate
from small_disk import small_disk
from tiny_training import Stage

from dice_py.compute.failures import failure_fields
from dice_py.errors import DamagedError
from dice_py.storage.files import read_json
from dice_py.storage.integrity import damaged_in
from dice_py.training.checkpoints import is_trained

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(llama: Path, pairs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    run = Stage(llama, pairs, tmp_path_factory.mktemp("undisturbed"))
    run()
    return run.weights()


@pytest.fixture
def run(llama: Path, pairs, tmp_path: Path) -> Stage:
    return Stage(llama, pairs, tmp_path)


def notes(run: Stage) -> list[str]:
    return [fields["text"] for event, fields in run.events if event == "note"]


def assert_undisturbed(run: Stage, weights: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(run.weights()[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("optimizer.pt", truncate),
        ("model.safetensors", flip),
        ("trainer_state.json", flip),
        ("rng_state.pth", empty),
        ("dice.json", flip),
        ("scheduler.pt", Path.unlink),
    ],
)
def test_a_damaged_checkpoint_is_not_used(
    run: Stage, undisturbed: dict[str, torch.Tensor], name: str, change: Callable[[Path], None]
) -> None:
    """The one before it is."""
    run.interrupt(at=5, save_steps=2)
    latest = run.out / "checkpoints/checkpoint-4"
    assert damaged_in(latest) == []
    assert len(read_json(latest / "dice.json")["files"]) >= 5
    change(latest / name)
    run(save_steps=2)
    assert run.steps() == [3, 4, 5, 6]
    assert notes(run)[0].startswith(f"{latest} is not used and deleted: {name} is ")
    assert notes(run)[1] == "training resumes from checkpoint-2"
    assert_undisturbed(run, undisturbed)


def test_without_a_whole_checkpoint_training_starts_again(run: Stage, undisturbed: dict[str, torch.Tensor]) -> None:
    run.interrupt(at=5, save_steps=2)
    for checkpoint in run.out.glob("checkpoints/checkpoint-*"):
        flip(checkpoint / "optimizer.pt")
    run(save_steps=2)
    assert run.steps() == [1, 2, 3, 4, 5, 6]
    assert_undisturbed(run, undisturbed)


def test_without_the_measurement_at_step_0_training_starts_again(run: Stage) -> None:
    """It is a figure of the result, and can be measured at the start alone."""
    run.interrupt(at=3, save_steps=2)
    flip(run.out / "checkpoints/step0.json")
    counts = run(save_steps=2)
    assert run.steps() == [1, 2, 3, 4, 5, 6]
    assert counts["step0_loss"] is not None


def test_a_checkpoint_without_a_stamp_was_being_written(run: Stage) -> None:
    run.interrupt(at=5, save_steps=2)
    (run.out / "checkpoints/checkpoint-4/dice.json").unlink()
    run(save_steps=2)
    assert run.steps() == [3, 4, 5, 6]
    assert notes(run) == ["training resumes from checkpoint-2"]


@pytest.mark.parametrize("kind", DAMAGE)
def test_every_file_of_a_model_counts(run: Stage, undisturbed: dict[str, torch.Tensor], kind: str) -> None:
    run()
    key = run.job().key()
    files = sorted(path for path in run.model.iterdir() if path.is_file())
    assert {"model.safetensors", "config.json", "tokenizer.json", "generation_config.json", "dice.json"} <= {
        path.name for path in files
    }
    for path in files:
        before = path.read_bytes()
        DAMAGE[kind](path)
        assert not is_trained(run.model, key), path
        path.write_bytes(before)
    assert is_trained(run.model, key)
    DAMAGE[kind](run.model / "config.json")
    run()
    assert run.steps() == [1, 2, 3, 4, 5, 6]
    assert any("cannot be used: config.json is damaged" in note and "model.damaged" in note for note in notes(run))
    assert_undisturbed(run, undisturbed)
    assert sorted(path.name for path in run.out.iterdir()) == ["log.jsonl", "model", "model.damaged"]


def test_a_damaged_training_set_is_not_trained_on(run: Stage) -> None:
    run(max_steps=1)
    flip(run.folder / "training_set.parquet")
    with pytest.raises(DamagedError, match=r"training_set\.parquet is damaged"):
        run.job("another", max_steps=1).run()


def test_a_disk_that_is_full_of_a_checkpoint_is_told_as_one(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk, pytest.raises(RuntimeError) as caught:
        torch.save({"moments": torch.ones(2**20)}, disk / "optimizer.pt")
    assert failure_fields(caught.value)["exit_code"] == 5
