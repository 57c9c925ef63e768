"""The presets in configs/: they resolve to the paper's settings (arXiv 2406.09760)."""

from __future__ import annotations

from pathlib import Path

import pytest
from places import ROOT

from dice_py.config.loading import dump, load_resolved, resolve
from dice_py.config.run import WORLD_DEFAULTS, RunConfig

CONFIGS = ROOT / "configs"
PRESETS = {"llama3-8b.yaml": (0.9, 1.0), "zephyr-7b.yaml": (0.7, 0.9)}
"""Preset → (temperature, top-p)."""

DATA = {"data": {"prompts": "prompts.jsonl", "replay": "pairs.jsonl"}}
OWN = {"model": {"policy": "policy-folder", "reference": "reference-folder"}, **DATA}


def test_every_preset_is_tested() -> None:
    assert {path.name for path in CONFIGS.glob("*.yaml")} == set(PRESETS)


@pytest.fixture(params=PRESETS)
def preset(request: pytest.FixtureRequest) -> str:
    return request.param


def test_the_papers_settings(preset: str) -> None:
    config = resolve([CONFIGS / preset], [], OWN)
    assert (config.generate.temperature, config.generate.top_p) == PRESETS[preset]
    assert (config.generate.samples, config.generate.max_new_tokens, config.generate.top_k) == (16, 2048, 0)
    assert config.mine.min_responses == 8
    assert (config.mine.debias, config.mine.alpha) == ("linear", "auto")
    assert (config.rounds.count, config.beta, config.replay.gamma) == (2, 0.1, 0.5)
    train = config.train
    assert (train.learning_rate, train.lr_scheduler_type, train.warmup_steps) == (5e-7, "constant_with_warmup", 50)
    assert (train.max_steps, train.batch_size) == (300, 32)
    assert train.lora is None


def test_models_are_named_and_can_be_overridden(preset: str) -> None:
    models = resolve([CONFIGS / preset], [], DATA).model
    assert models.policy
    assert models.reference
    assert models.policy != models.reference
    config = resolve([CONFIGS / preset], [], OWN)
    assert (config.model.policy, config.model.reference) == ("policy-folder", "reference-folder")
    assert (config.data.prompts, config.data.replay) == ("prompts.jsonl", "pairs.jsonl")


def test_no_world_defaults_are_in_it(preset: str, tmp_path: Path) -> None:
    config = resolve([CONFIGS / preset], [], OWN)
    assert config.train.sft_weight == RunConfig.model_fields["train"].default_factory().sft_weight == 0.0
    assert config.train.sft_weight != WORLD_DEFAULTS["train"]["sft_weight"]
    stored = tmp_path / "config.yaml"
    stored.write_text(dump(config), encoding="utf-8")
    assert load_resolved(stored) == config
