"""Checks prompts and the responses to them against the limits of a model (models/limits.py)."""

from __future__ import annotations

from pathlib import Path

from dice_py.config.shared import ModelConfig
from dice_py.errors import DataError, UsageError
from dice_py.models.limits import positions_limit, read_config


def check_fits(policy: Path, models: ModelConfig, longest_prompt: int, largest_id: int, max_new_tokens: int) -> None:
    """Checks prompts and responses against the model's positions and vocabulary.

    Args:
        longest_prompt: in tokens.
        largest_id: largest token id of all prompts.

    Raises:
        UsageError: the longest prompt and its response exceed the model's positions.
        DataError: the tokenizer has an id for which the model has no embedding.
    """
    config = read_config(policy, models)
    if config is None:
        return  # An adapter: the config of its base model is elsewhere.
    limit = positions_limit(config)
    if limit is not None and longest_prompt + max_new_tokens > limit:
        raise UsageError(
            f"the longest prompt has {longest_prompt} tokens and generate.max_new_tokens is {max_new_tokens}: "
            f"{longest_prompt + max_new_tokens} together, but the model in {policy} has {limit:.0f} positions; lower "
            "generate.max_new_tokens, or lower data.max_prompt_tokens to leave longer prompts out"
        )
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if vocabulary is not None and largest_id >= vocabulary:
        raise DataError(
            f"{policy}: the tokenizer uses token id {largest_id}, but the model's vocabulary has {vocabulary} entries; "
            "use the tokenizer that belongs to the model"
        )
