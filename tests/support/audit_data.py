"""Data of audits made from numbers, without models or texts."""

from __future__ import annotations

import numpy as np

from dice_py.evaluation.audit.data import AuditData, Comparisons, comparisons_of_scores


def pairs(better_tokens: list[int], worse_tokens: list[int], prompt: list[int] | None = None) -> AuditData:
    """Preference pairs of these lengths; each of a prompt of its own, if none is given."""
    count = len(better_tokens)
    tokens = np.stack([better_tokens, worse_tokens], axis=1).reshape(-1)
    numbers = np.unique(list(range(count)) if prompt is None else prompt, return_inverse=True)[1]
    places = np.arange(count)
    comparisons = Comparisons(2 * places, 2 * places + 1, np.ones(count))
    return AuditData(np.repeat(numbers, 2), tokens, comparisons)


def scored(
    prompt: list[int], score: list[float], tokens: list[int] | None = None, model: list[int] | None = None
) -> AuditData:
    """Scored responses; all of 10 tokens, if no lengths are given."""
    numbers, scores = np.array(prompt), np.array(score, dtype=np.float64)
    names = () if model is None else tuple(f"m{number}" for number in range(max(model) + 1))
    return AuditData(
        numbers,
        np.full(len(score), 10) if tokens is None else np.array(tokens),
        comparisons_of_scores(numbers, scores),
        scores,
        None if model is None else np.array(model),
        names,
    )
