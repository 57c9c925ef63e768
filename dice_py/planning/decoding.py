"""Decoding steps of a set of responses, and costs of a step and of a token, fitted to measurements."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

_MAX_SIMULATED = 200_000
"""Responses that are simulated, at most; the steps of all are extrapolated from theirs."""


def decode_steps(lengths: Sequence[int], rows: int, continuous: bool) -> int:
    """Forward passes that decode responses of these lengths (in tokens), `rows` at a time, in this order.

    With `continuous` batching, a response that ends makes room for the next one; else a batch runs as long as its
    longest response.
    """
    if not len(lengths):
        return 0
    simulated = list(lengths[:_MAX_SIMULATED])
    if not continuous:
        steps = sum(max(simulated[start : start + rows]) for start in range(0, len(simulated), rows))
    else:
        ends: list[int] = []
        for length in simulated:
            heapq.heappush(ends, length + (heapq.heappop(ends) if len(ends) >= rows else 0))
        steps = max(ends)
    return round(steps * len(lengths) / len(simulated))


def draw_lengths(lengths: Sequence[int], count: int) -> list[int]:
    """`count` lengths drawn with replacement from `lengths`, the same ones in every call."""
    drawn: list[int] = np.random.default_rng(0).choice(np.asarray(lengths), size=count).tolist()
    return drawn


def fit_decoding(runs: Sequence[tuple[int, int, float]]) -> tuple[float, float]:
    """(seconds a step, seconds a token), neither negative, from a small and a large run.

    Solves seconds = step cost × steps + token cost × tokens for the two. Where that has no solution without a negative
    cost, all seconds of the large run are attributed to its tokens or to its steps, whichever explains the small run
    better.

    Args:
        runs: (steps, tokens, seconds) of each run.
    """
    (steps, tokens, seconds), (more_steps, more_tokens, more_seconds) = runs[0], runs[-1]
    determinant = steps * more_tokens - more_steps * tokens
    if determinant:
        step = (seconds * more_tokens - more_seconds * tokens) / determinant
        token = (steps * more_seconds - more_steps * seconds) / determinant
        if step >= 0 and token >= 0:
            return step, token
    by_token, by_step = more_seconds / max(1, more_tokens), more_seconds / max(1, more_steps)
    if abs(by_step * steps - seconds) < abs(by_token * tokens - seconds):
        return by_step, 0.0
    return 0.0, by_token
