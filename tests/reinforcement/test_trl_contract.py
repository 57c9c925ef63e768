"""What reinforcement/trainer.py relies on in the installed TRL: one test for each hook of both trainers."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import trl
from trl import GRPOTrainer, RLOOTrainer
from trl.data_utils import is_conversational

from dice_py.config.mpo import MpoConfig
from dice_py.reinforcement.trainer import TRAINERS

BOTH = pytest.mark.parametrize("trainer", [GRPOTrainer, RLOOTrainer])


@BOTH
@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("_tokenize_prompts", "prompts"),
        ("_generate_single_turn", "prompt_ids"),
        ("_generate_and_score_completions", "inputs"),
        ("_generate", "prompts"),
    ],
)
def test_hooks_are_there(trainer: type, name: str, first: str) -> None:
    assert list(inspect.signature(getattr(trainer, name)).parameters)[:2] == ["self", first]


@BOTH
def test_the_hooks_are_called(trainer: type) -> None:
    generate, score = (
        inspect.getsource(getattr(trainer, f"_generate{name}")) for name in ("", "_and_score_completions")
    )
    assert re.search(r"prompt_ids, images, multimodal_fields = self\._tokenize_prompts\(prompts\)", generate)
    assert "self._generate_single_turn(" in generate
    assert "self._generate(prompts)" in score
    assert "self._calculate_rewards(inputs, prompts, completions, completion_ids_list)" in score


def test_token_ids_are_no_conversation() -> None:
    assert not is_conversational({"prompt": [3, 4, 5]})


@pytest.mark.parametrize("name", ["GRPOConfig", "RLOOConfig"])
def test_a_step_is_of_one_policy(name: str, tmp_path: Any) -> None:
    """Responses are sampled once for each optimizer step."""
    config = getattr(trl, name)(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", per_device_train_batch_size=2,
        gradient_accumulation_steps=4, num_generations=4, num_iterations=1,
    )  # fmt: skip
    assert config.steps_per_generation == config.gradient_accumulation_steps == 4
    assert config.generation_batch_size == 8


@pytest.mark.parametrize("name", ["GRPOConfig", "RLOOConfig"])
def test_options_that_are_set_here_are_options(name: str, tmp_path: Any) -> None:
    """Beside them, those of only one of the two, and of MpoConfig itself."""
    known = getattr(trl, name).__dataclass_fields__
    for option in ("beta", "max_steps", "num_generations", "temperature", "max_completion_length", "shuffle_dataset"):
        assert option in known
        with pytest.raises(ValueError, match=f"{option} cannot be passed on"):
            MpoConfig(trainer_args={option: 1})
    assert MpoConfig(trainer_args={"epsilon": 0.1}).trainer_args == {"epsilon": 0.1}


@pytest.mark.parametrize("name", TRAINERS)
def test_ours_is_the_trainer_of_its_name(name: str) -> None:
    assert issubclass(TRAINERS[name], {"grpo": GRPOTrainer, "rloo": RLOOTrainer}[name])
    # The mixin's hooks come first.
    assert TRAINERS[name]._tokenize_prompts(None, [[3]]) == ([[3]], None, {})  # type: ignore[arg-type]
