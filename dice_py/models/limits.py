"""Limits of a model that prompts and responses must keep: its positions and its vocabulary. Without torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dice_py.config.shared import ModelConfig
from dice_py.errors import DataError


def positions_limit(config: Any) -> float | None:
    """Tokens that fit into a model's positions, from its transformers config; None if the config has no limit."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    # There is one set of parameters, or one for each type of layer. `max_position_embeddings` includes the scaling of
    # YaRN, LongRoPE and Llama 3, but not that of "linear" and "dynamic".
    parameter_sets = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    factors = [one.get("factor") or 1.0 for one in parameter_sets if one.get("rope_type") in ("linear", "dynamic")]
    return float(limit * max(factors, default=1.0))


def read_config(folder: Path, models: ModelConfig) -> Any | None:
    """The transformers config of a model folder; None for an adapter, whose base model's config is elsewhere.

    Raises:
        DataError: transformers cannot read it.
    """
    if not (folder / "config.json").is_file():
        return None
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=models.trust_remote_code)
    except Exception as error:  # a config of a newer version, or one that is cut off
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{folder}: transformers cannot read config.json: {first_line}") from None


def model_positions(folder: Path, models: ModelConfig) -> float | None:
    """Tokens that fit into the positions of the model in a folder; None if there is no limit, or it is not known."""
    config = read_config(folder, models)
    return None if config is None else positions_limit(config)


def check_positions(
    tokens: Iterable[int], limit: float | None, *, where: str, model: str, remedy: str, noun: str = "row"
) -> None:
    """Checks the lengths of sequences against the positions of a model.

    Args:
        tokens: of each sequence, prompt and response together.
        limit: the model's positions; None: no limit.
        where: the file, as the error names it.
        model: the model, as the error names it.
        remedy: what to do.
        noun: what the sequences are.

    Raises:
        DataError: the first sequence that is too long; the message has its number and how many there are.
    """
    if limit is None:
        return
    too_long = [(row, count) for row, count in enumerate(tokens) if count > limit]
    if too_long:
        row, count = too_long[0]
        more = "" if len(too_long) == 1 else f" ({len(too_long)} are too long)"
        raise DataError(
            f"{where}, {noun} {row}: prompt and response have {count} tokens, but {model} has {limit:.0f} "
            f"positions{more}; {remedy}"
        )


def vocabulary_size(folder: Path, models: ModelConfig) -> int | None:
    """Rows of the embedding of the model in a folder, from its config; None if it is not known."""
    config = read_config(folder, models)
    size = None if config is None else getattr(config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) else None
