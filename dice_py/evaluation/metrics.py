"""Statistics of an evaluation: bootstrap intervals, accuracies, win rates."""

from __future__ import annotations

import polars as pl

RESAMPLES = 2000


def bootstrap_ci95(values: list[float], seed: int) -> list[float]:
    """95 % interval of the mean by a percentile bootstrap over prompts (2000 resamples, seeded)."""
    import numpy as np

    data = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed % 2**63)
    means = [data[rng.integers(0, len(data), len(data))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return [float(low), float(high)]


def reward_accuracy(chosen: pl.Series, rejected: pl.Series) -> float:
    """Share of pairs whose chosen has the higher reward, equal rewards counted half."""
    return float(((chosen > rejected).cast(pl.Float64) + 0.5 * (chosen == rejected).cast(pl.Float64)).mean())  # type: ignore[arg-type]


def win_rate(pairs: list[tuple[list[float], list[float]]]) -> list[float]:
    """For each prompt, the share of (ours, theirs) score pairs that ours wins, ties counted half."""
    rates = []
    for ours, theirs in pairs:
        won = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a in ours for b in theirs)
        rates.append(won / (len(ours) * len(theirs)))
    return rates
