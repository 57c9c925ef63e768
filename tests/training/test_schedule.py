"""The steps of a training, and its warm-up as a number or a share of them."""

from __future__ import annotations

import pytest
from plan_data import own

from dice_py.config.loading import resolve
from dice_py.config.training import LoraConfig, TrainConfig
from dice_py.errors import UsageError
from dice_py.training.schedule import setting_notes, training_steps, warmup_note, warmup_steps


@pytest.mark.parametrize(
    ("assignments", "pairs", "processes", "want"),
    [
        (["train.batch_size=32", "train.per_device_train_batch_size=32"], 854, 1, 27),
        (["train.batch_size=32", "train.per_device_train_batch_size=4"], 854, 1, 27),
        (["train.batch_size=32", "train.per_device_train_batch_size=4"], 854, 4, 27),
        (["train.batch_size=32", "train.per_device_train_batch_size=4", "train.num_train_epochs=2"], 64, 1, 4),
        (["train.batch_size=32", "train.per_device_train_batch_size=4"], 3, 1, 1),
        (["train.max_steps=7"], 854, 1, 7),
    ],
)
def test_training_steps(assignments: list[str], pairs: int, processes: int, want: int) -> None:
    assert training_steps(own(*assignments).train, pairs, processes) == want


@pytest.mark.parametrize(
    ("setting", "steps", "want"), [(0.1, 300, 30), (0.1, 19, 1), (0.1, 9, 0), (0.0, 9, 0), (50, 20, 50), (0, 20, 0)]
)
def test_a_share_is_rounded_down_and_a_number_is_taken_as_it_is(setting: float, steps: int, want: int) -> None:
    assert warmup_steps(TrainConfig(warmup_steps=setting), steps) == want


def test_the_default_warms_up_over_a_share_and_never_over_the_only_step() -> None:
    assert warmup_steps(TrainConfig(), 1) == 0
    assert warmup_steps(TrainConfig(), 100) == 10
    assert all(warmup_note(TrainConfig(), steps) is None for steps in range(10, 200))
    assert warmup_note(TrainConfig(), 1) == "train.warmup_steps is 0.1 of 1 step: no warm-up"


def test_a_warm_up_of_more_than_a_third_of_the_steps_is_warned_of() -> None:
    config = TrainConfig(warmup_steps=50, learning_rate=5e-7)
    assert warmup_note(config, 150) is None
    text = warmup_note(config, 100, section="round0")
    assert text is not None
    assert "round0.warmup_steps is 50" in text
    assert "100 steps" in text
    assert "reached after 50%" in text
    text = warmup_note(config, 20)
    assert text is not None
    assert "never reached" in text
    assert "5e-07" in text
    assert warmup_note(config.model_copy(update={"lr_scheduler_type": "constant"}), 20) is None


@pytest.mark.parametrize("text", ["-1", "1.5", "-0.1", "nan", "half"])
def test_neither_a_number_of_steps_nor_a_share(text: str) -> None:
    with pytest.raises(UsageError, match=r"train\.warmup_steps"):
        resolve([], [f"train.warmup_steps={text}"])


def test_settings_that_train_nothing_or_do_nothing_are_warned_of() -> None:
    assert setting_notes(TrainConfig(), 100) == []
    assert setting_notes(TrainConfig(lora=LoraConfig(), learning_rate=1e-5), None) == []
    (text,) = setting_notes(TrainConfig(learning_rate=5e-12), 100, section="round0")
    assert text.startswith("warning: round0.learning_rate is 5e-12, with which the policy hardly moves")
    (text,) = setting_notes(TrainConfig(lora=LoraConfig(dropout=0.1)), None)
    assert text.startswith("warning: train.lora.dropout is 0.1 and changes nothing")
    assert len(setting_notes(TrainConfig(warmup_steps=50, learning_rate=1e-12), 20)) == 2


@pytest.mark.parametrize("value", ["1", "1.0", "-0.1", "nan"])
def test_a_decay_with_which_no_optimizer_can_be_built(value: str) -> None:
    with pytest.raises(UsageError, match=r"train\.adam_beta2"):
        resolve([], [f"train.adam_beta2={value}"])
