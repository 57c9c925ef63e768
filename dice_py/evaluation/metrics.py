"""Statistics of an evaluation: bootstrap intervals, reward accuracy and win rates. Judges are in evaluation/judges/."""

from __future__ import annotations

import polars as pl

RESAMPLES = 2000
_ENTRIES = 500_000
"""Of a block of resamples, which is drawn at once: 4 MB."""


def bootstrap_ci95(values: list[float], seed: int) -> list[float]:
    """95 % confidence interval [low, high] of the mean of `values`, by a percentile bootstrap of 2000 resamples.

    Args:
        values: one or more, independent of each other (one per prompt, for example).
        seed: 0 or more; the same seed gives the same interval.
    """
    # Here, so that commands that need no statistics start without NumPy.
    import numpy as np

    data = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed % 2**63)
    means: list[float] = []
    while len(means) < RESAMPLES:
        rows = min(RESAMPLES - len(means), max(1, _ENTRIES // len(data)))
        means += data[rng.integers(0, len(data), (rows, len(data)))].mean(axis=1).tolist()
    low, high = np.percentile(means, [2.5, 97.5])
    return [float(low), float(high)]


def reward_outcomes(chosen: pl.Series, rejected: pl.Series) -> pl.Series:
    """1.0 for each pair whose chosen response has the higher reward, 0.5 for a tie, else 0.0.

    Args:
        chosen, rejected: the rewards of each pair.
    """
    return (chosen > rejected).cast(pl.Float64) + 0.5 * (chosen == rejected).cast(pl.Float64)


def reward_accuracy(chosen: pl.Series, rejected: pl.Series) -> float:
    """Share of pairs, 0 to 1, whose chosen response has the higher reward; ties count half.

    Args:
        chosen, rejected: the rewards of each pair; one or more numbers, as many in both.
    """
    return float(reward_outcomes(chosen, rejected).mean())  # type: ignore[arg-type]


def win_rate(pairs: list[tuple[list[float], list[float]]]) -> list[float]:
    """The win rate of each prompt, 0 to 1: the share of score pairs that ours wins; ties count half.

    Args:
        pairs: for each prompt the scores of our samples and of theirs, one or more each. All combinations count.
    """
    rates = []
    for ours, theirs in pairs:
        wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a in ours for b in theirs)
        rates.append(wins / (len(ours) * len(theirs)))
    return rates
