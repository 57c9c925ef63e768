"""Checks prompts and the responses to them against the limits of a model (models/limits.py), and of sampling."""

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


def cut_off_note(shard: str, cut_off: int, responses: int, max_new_tokens: int) -> str | None:
    """A warning where most responses of a shard were cut off by the token limit, which mining drops; else None."""
    if cut_off * 2 <= responses:
        return None
    return (
        f"warning: {cut_off} of {responses} responses of {shard} ({cut_off / responses:.0%}) were cut off at "
        f"generate.max_new_tokens={max_new_tokens}; mining drops them. Stop here and raise generate.max_new_tokens; if "
        "the responses run on after their end, the token that ends a turn in the chat template is no stop token of the "
        "model (eos_token_id in its generation_config.json)"
    )
