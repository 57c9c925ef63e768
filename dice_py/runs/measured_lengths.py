"""How long the responses of a policy to some prompts were, for the next `dice plan`, and the key of that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from dice_py.config.run import RunConfig
from dice_py.models.identity import model_identity
from dice_py.models.own_template import template_key
from dice_py.runs.measured_costs import ResponseLengths
from dice_py.storage.keys import digest
from dice_py.storage.parquet import parquet_key

_MAX_LENGTHS = 8192  # response lengths that are kept


def lengths_key(config: RunConfig, policy: Path, prompts: Path) -> str:
    """The key of response lengths: policy, prompts, chat template, sampling, and which responses are usable."""
    generate = config.generate
    usable = [config.mine.min_responses, config.mine.min_length]
    sampling: list[Any] = [
        generate.temperature, generate.top_p, generate.top_k, generate.max_new_tokens, generate.samples, usable,
    ]  # fmt: skip
    sampling += filter(None, [generate.sampling_params, template_key(config.model)])
    return digest(model_identity(policy), parquet_key(prompts), sampling)


def usable_responses(config: RunConfig) -> pl.Expr:
    """Whether mining can use a response: it was not cut off, and is neither too short nor too long."""
    usable = (pl.col("finish_reason") == "stop") & (pl.col("response_tokens") >= (config.mine.min_length or 0))
    if config.mine.max_length is not None and config.mine.length == "tokens":
        usable &= pl.col("response_tokens") <= config.mine.max_length
    return usable


def response_lengths(config: RunConfig, responses: pl.DataFrame) -> ResponseLengths:
    """The lengths of responses, and the shares of usable prompts and cut-off responses.

    Args:
        responses: `prompt_id`, `response_tokens`, `finish_reason`.
    """
    by_prompt = responses.group_by("prompt_id").agg(usable_responses(config).sum().alias("usable"))
    step = max(1, responses.height // _MAX_LENGTHS)
    return ResponseLengths(
        lengths=responses["response_tokens"].gather_every(step)[:_MAX_LENGTHS].to_list(),
        usable=float((by_prompt["usable"] >= config.mine.min_responses).mean()),  # type: ignore[arg-type]
        cut_off=float((responses["finish_reason"] == "length").mean()),  # type: ignore[arg-type]
    )
