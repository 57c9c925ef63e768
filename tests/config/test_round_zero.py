"""model.sft and round0: what is needed, what excludes it, and the training that it gives."""

from __future__ import annotations

import pytest
from own_config import refused

from dice_py.config.loading import dump, load_resolved, resolve
from dice_py.config.training import TrainConfig
from dice_py.runs.folder import stage_names

SFT = ("model.sft=sft-folder", "data.replay=pairs.jsonl")


def test_an_sft_model_and_pairs_are_enough() -> None:
    config = resolve([], SFT)
    assert config.has_round_zero
    assert not config.is_world
    assert config.beta == 0.1  # not the world's
    assert config.data.prompts is None  # the pairs' prompts
    assert stage_names(config)[:3] == ["round-00/replay", "round-00/train", "round-01/generate"]
    assert len(stage_names(config)) == 2 + 2 * 7


def test_a_run_without_an_sft_model_has_no_round_zero() -> None:
    config = resolve([], ["model.policy=p", "model.reference=r", "data.prompts=x", "data.replay=y"])
    assert not config.has_round_zero
    assert stage_names(config)[0] == "round-01/generate"


@pytest.mark.parametrize("name", ["policy", "reference"])
def test_the_sft_model_stands_for_both_models(name: str) -> None:
    said = refused(*SFT, f"model.{name}=folder")
    assert f"model.{name} (--{name}) given together with model.sft (--sft)" in said
    assert "Leave out model.sft, or the others" in said


def test_round_zero_needs_offline_pairs() -> None:
    said = refused("model.sft=sft-folder", "data.prompts=prompts.jsonl")
    assert "model.sft (--sft) is given without offline pairs" in said
    assert "give data.replay (--replay FILE)" in said
    # Not even where no round replays any.
    assert "without offline pairs" in refused("model.sft=sft-folder", "data.prompts=x", "replay.gamma=0")


@pytest.mark.parametrize("models", [(), ("model.policy=p", "model.reference=r", "data.prompts=x", "data.replay=y")])
def test_settings_of_a_round_zero_that_there_is_not(models: tuple[str, ...]) -> None:
    said = refused(*models, "round0.learning_rate=1e-5")
    assert "round0 sets the training of π_1 from an SFT model, which is not given" in said


def test_round_zero_trains_as_the_rounds_do_unless_told_otherwise() -> None:
    config = resolve([], [*SFT, "train.learning_rate=1e-6", "train.batch_size=8"])
    assert config.round0.training(config.train) == config.train
    other = resolve([], [*SFT, "round0.learning_rate=1e-5", "round0.sft_weight=0.5", "round0.warmup_steps=0"])
    training = other.round0.training(other.train)
    assert (training.learning_rate, training.sft_weight, training.warmup_steps) == (1e-5, 0.5, 0)
    assert training.batch_size == other.train.batch_size == TrainConfig().batch_size
    assert other.train.learning_rate == TrainConfig().learning_rate


def test_epochs_of_round_zero_are_not_cut_by_the_steps_of_a_round() -> None:
    config = resolve([], [*SFT, "train.max_steps=5", "round0.num_train_epochs=2"])
    training = config.round0.training(config.train)
    assert (training.num_train_epochs, training.max_steps) == (2.0, None)
    both = resolve([], [*SFT, "round0.max_steps=7", "round0.num_train_epochs=2"])
    assert both.round0.training(both.train).max_steps == 7


def test_a_stored_config_keeps_round_zero(yaml_file) -> None:
    config = resolve([], [*SFT, "round0.learning_rate=1e-5"])
    assert load_resolved(yaml_file(dump(config))) == config
