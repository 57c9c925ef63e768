"""Limits of a model that prompts and responses must keep: its positions and its vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dice_py.config.shared import ModelConfig
from dice_py.errors import DataError, UsageError


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
