"""The calibration's training: its settings, what it makes of the times of steps, and the timer of updates."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
from plan_data import own

from dice_py.config.training import TrainConfig
from dice_py.planning.calibrate_training import step_costs, training_settings
from dice_py.planning.calibration_sizes import Training
from dice_py.training import update_timer as module
from dice_py.training.pair_terms import load_pairs
from dice_py.training.parallelism import lay_out
from dice_py.training.update_timer import update_timer


def test_smaller_steps_have_a_layout_and_one_checkpoint() -> None:
    config = own(
        "train.batch_size=32", "train.per_device_train_batch_size=4", "train.save_steps=10", "train.max_length=50",
        "model.device=cpu",
    )  # fmt: skip
    settings = training_settings(config, Training(5, 3, 1))
    assert (settings.batch_size, settings.per_device_train_batch_size, settings.max_steps) == (5, 1, 3)
    assert (settings.save_steps, settings.step0_pairs, settings.max_length) == (3, 5, None)
    assert training_settings(own("train.save_steps=null"), Training(5, 3, 1)).save_steps is None
    # As many processes as the run's, even where "auto" would be fewer for the smaller batch.
    two = training_settings(config, Training(6, 3, 2))
    assert lay_out(two, config.model, config.devices).processes == 2
    assert two.batch_size % (two.per_device_train_batch_size * 2) == 0


@pytest.mark.parametrize(
    "assignments",
    [["train.method=sppo"], ["train.method=spa", "train.label_smoothing=0.2"], ["train.method=rdpo"],
     ["train.method=cream", "train.ld_alpha=0.5"], ["train.weight_column=margin", "train.reference=initial"]],
    ids=str,
)  # fmt: skip
def test_pairs_without_labels_can_be_trained_on(assignments: list[str], tmp_path: Path) -> None:
    """The calibration's pairs are of no round: whatever the method, its training reads them."""
    pairs = pl.DataFrame(
        {
            "prompt_ids": [[1]], "chosen_ids": [[2]], "rejected_ids": [[3]], "ref_chosen_logps": [-1.0],
            "ref_rejected_logps": [-2.0],
        }
    )  # fmt: skip
    pairs.write_parquet(tmp_path / "training_set.parquet")
    settings = training_settings(own(*assignments), Training(1, 3, 1))
    loaded, _ = load_pairs(tmp_path / "training_set.parquet", settings, 0.1)
    assert loaded.columns == pairs.columns
    assert TrainConfig.model_validate(settings.model_dump()) == settings


def test_the_update_is_apart_from_a_steps_tokens() -> None:
    # The update takes 0.5 s whatever the tokens take; the first one allocates states, and a pause hits the last step.
    for tokens in (2.0, 4.0):
        gaps = [tokens + 0.5] * 4 + [30.0]
        ends = [10.0 + sum(gaps[:count]) for count in range(6)]
        step, update = step_costs(ends, [3.0, 0.5, 0.5, 0.5, 0.5, 28.0])
        assert (step - update, update) == pytest.approx((tokens, 0.5))
    assert step_costs([0.0, 1.0, 2.0], [0.1, 5.0, 5.0]) == (1.0, 1.0)  # never more than the step


def test_the_timer_reports_updates_and_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 10.5, 12.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    calls: list[Any] = []
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device=SimpleNamespace(type="cpu")),
        training_step=lambda *arguments: calls.append(arguments) or "loss",
    )
    events: list[tuple[str, dict[str, Any]]] = []
    timer = update_timer(trainer, lambda event, **fields: events.append((event, fields)))  # type: ignore[arg-type]
    assert trainer.training_step("model", "inputs") == "loss"
    assert calls == [("model", "inputs")]
    timer.on_step_end(None, None, None)
    timer.on_save(None, None, None)
    assert events == [
        ("update", {"stage": "train", "seconds": 0.5}),
        ("checkpoint", {"stage": "train", "seconds": 1.5}),
    ]
