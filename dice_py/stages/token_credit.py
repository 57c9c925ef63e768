"""Adds the credits of their tokens to pairs that people read: both models are run over both responses of each pair."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from dice_py.config.shared import ModelConfig
from dice_py.config.stages import ScoreConfig
from dice_py.events import Report
from dice_py.models.token_pieces import TokenPieces
from dice_py.models.tokenization import read_tokenizer
from dice_py.scoring.credit import credit_pieces, policy_and_reference_logps, summed_credit
from dice_py.scoring.shards import token_arrays
from dice_py.storage.schemas import TOKEN_CREDIT

_SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Credited:
    """Pairs with credits."""

    pairs: pl.DataFrame
    """With `chosen_credit` and `rejected_credit`."""
    rewards: pl.DataFrame
    """`chosen` and `rejected` f64: the sum of each response's credits."""
    tokens: int
    """Tokens of responses that both models were run over."""


def with_credit(
    pairs: pl.DataFrame,
    *,
    config: ScoreConfig,
    models: ModelConfig,
    policy: Path,
    reference: Path,
    beta: float,
    report: Report,
) -> Credited:
    """The pairs with the credit of each token of both responses.

    Args:
        pairs: `prompt_ids`, `chosen_ids` and `rejected_ids`, lists of token ids; an empty response has no credits.

    Raises:
        DataError: the token ids are not of these models, or a log-probability is not finite.
    """
    prompts = token_arrays(pairs, "prompt_ids", "the pairs")
    sides = [token_arrays(pairs, f"{side}_ids", "the pairs") for side in _SIDES]
    responses = [*sides[0], *sides[1]]
    answered = [number for number, ids in enumerate(responses) if len(ids)]
    logps, ref_logps = policy_and_reference_logps(
        config,
        models,
        policy=policy,
        reference=reference,
        prompts=[prompts[number % len(prompts)] for number in answered],
        responses=[responses[number] for number in answered],
        report=report,
    )
    pieces = TokenPieces(read_tokenizer(policy, models))
    credits: list[list[dict[str, object]]] = [[] for _ in responses]
    rewards = [0.0] * len(responses)
    for number, of_policy, of_reference in zip(answered, logps, ref_logps, strict=True):
        credits[number] = credit_pieces(pieces, responses[number], of_policy, of_reference, beta)
        rewards[number] = summed_credit(of_policy, of_reference, beta)
    halves = {"chosen": slice(pairs.height), "rejected": slice(pairs.height, None)}
    return Credited(
        pairs.with_columns(
            pl.Series(f"{side}_credit", credits[half], dtype=pl.List(TOKEN_CREDIT)) for side, half in halves.items()
        ),
        pl.DataFrame({side: rewards[half] for side, half in halves.items()}, schema=dict.fromkeys(_SIDES, pl.Float64)),
        sum(map(len, responses)),
    )
