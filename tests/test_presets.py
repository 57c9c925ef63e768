"""The presets in configs/: they resolve, and hold the paper's settings (arXiv 2406.09760)."""

from __future__ import annotations

from pathlib import Path

import pytest

from dice_py.config.loading import dump, load_resolved, resolve
from dice_py.config.run import WORLD_DEFAULTS, RunConfig

CONFIGS = Path(__file__).parent.parent / "configs"
PRESETS = {"llama3-8b.yaml": (0.9, 1.0), "zephyr-7b.yaml": (0.7, 0.9)}
"""Of each preset, temperature and top-p."""

DATA = {"data": {"prompts": "prompts.jsonl", "replay": "pairs.jsonl"}}
OWN = {"model": {"policy": "policy-folder", "reference": "reference-folder"}, **DATA}


def test_every_preset_is_looked_at() -> None:
    assert {path.name for path in CONFIGS.glob("*.yaml")} == set(PRESETS)


@pytest.fixture(params=PRESETS)
def preset(request: pytest.FixtureRequest) -> str:
    return request.param


def test_the_papers_settings(preset: str) -> None:
    found = resolve([CONFIGS / preset], [], OWN)
    assert (found.generate.temperature, found.generate.top_p) == PRESETS[preset]
    assert (found.generate.samples, found.generate.max_new_tokens, found.generate.top_k) == (16, 2048, 0)
    assert found.mine.min_responses == 8
    assert (found.mine.debias, found.mine.alpha) == ("linear", "auto")
    assert (found.rounds, found.beta, found.replay.gamma) == (2, 0.1, 0.5)
    train = found.train
    assert (train.learning_rate, train.lr_scheduler_type, train.warmup_steps) == (5e-7, "constant_with_warmup", 50)
    assert (train.max_steps, train.batch_size) == (300, 32)
    assert train.lora is None


def test_models_are_named_and_may_be_named_otherwise(preset: str) -> None:
    models = resolve([CONFIGS / preset], [], DATA).model
    assert models.policy
    assert models.reference
    assert models.policy != models.reference
    found = resolve([CONFIGS / preset], [], OWN)
    assert (found.model.policy, found.model.reference) == ("policy-folder", "reference-folder")
    assert (found.data.prompts, found.data.replay) == ("prompts.jsonl", "pairs.jsonl")


def test_nothing_of_the_worlds_is_in_it(preset: str, tmp_path: Path) -> None:
    found = resolve([CONFIGS / preset], [], OWN)
    assert found.train.sft_weight == RunConfig.model_fields["train"].default_factory().sft_weight == 0.0
    assert found.train.sft_weight != WORLD_DEFAULTS["train"]["sft_weight"]
    stored = tmp_path / "config.yaml"
    stored.write_text(dump(found), encoding="utf-8")
    assert load_resolved(stored) == found
