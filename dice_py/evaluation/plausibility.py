"""Warnings about models whose rewards on offline pairs cannot be right: swapped ones, and ones with random weights."""

from __future__ import annotations

import math

import polars as pl

_FAR_BELOW_HALF = 0.4
_CHANCE = 0.005
"""Probability, if each pair were right by chance, below which an accuracy is not called chance."""
_RANDOM_SHARE = 0.85
"""A model that assigns every token the same probability has a loss of 1.0 × ln(vocabulary). No trained one is near."""


def swap_warning(accuracy: float, pairs: int) -> str | None:
    """A sentence where the implicit reward ranks far fewer than half of the pairs right; None elsewhere.

    Args:
        accuracy: share of pairs whose chosen answer has the higher reward.
        pairs: their number.
    """
    right = math.floor(accuracy * pairs)
    # Of a thousand pairs, none of these accuracies is chance.
    chance = sum(math.comb(pairs, count) for count in range(right + 1)) / 2**pairs if pairs <= 1000 else 0.0
    if accuracy >= _FAR_BELOW_HALF or chance >= _CHANCE:
        return None
    return (
        f"warning: the implicit reward ranks only {accuracy:.2f} of {pairs} offline pairs right, far below one half: "
        "policy and reference are probably swapped (the policy is the DPO-tuned model, the reference the one that its "
        "training started from), or chosen and rejected are"
    )


def random_warning(role: str, loss: float, vocabulary: int) -> str | None:
    """A sentence where a model predicts chosen answers no better than one with random weights; None elsewhere.

    Args:
        role: names the model.
        loss: mean negative log-probability of a token of the chosen answers, in nats.
        vocabulary: number of its entries.
    """
    if vocabulary < 2 or loss < _RANDOM_SHARE * math.log(vocabulary):
        return None
    return (
        f"warning: the {role}'s mean loss on chosen answers is {loss:.2f} nats a token, and a model that knows nothing "
        f"has {math.log(vocabulary):.2f} (the logarithm of its vocabulary): are its weights random, or do its "
        "tokenizer or template belong to another model?"
    )


def mean_loss(logps: pl.Series, ids: pl.Series) -> float:
    """Mean negative log-probability of a token.

    Args:
        logps: sum over each response, in nats.
        ids: lists of the responses' token ids.
    """
    tokens = int(ids.list.len().sum())
    return -float(logps.sum()) / tokens if tokens else 0.0
