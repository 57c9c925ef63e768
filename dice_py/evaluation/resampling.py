"""Bootstrap over prompts: the pairs of one prompt, and the responses to it, are not independent of one another.

A resample draws prompts with replacement, each with all of its rows. What is a function of sums over prompts (a mean, a
ratio, a correlation) needs only their sums, so that all resamples are one product of matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dice_py.evaluation.metrics import RESAMPLES

_ENTRIES = 10_000_000
"""Of a matrix of resamples × prompts: 80 MB."""
_FEWEST = 200


class Figure(NamedTuple):
    """A measure and its 95 % interval."""

    value: float | None
    """None: it is not defined on these data."""
    ci95: list[float] | None = None
    """[low, high]; None where there is none."""

    def as_json(self) -> dict[str, float | list[float] | None]:
        """`value` and `ci95`."""
        return self._asdict()


class Resamples:
    """How often each prompt is in each resample. Figures that share them have paired differences.

    There are 2000 resamples; fewer, but at least 200, where the prompts are more than 5000.

    Args:
        prompts: their number, one or more.
        seed: 0 or more.
    """

    def __init__(self, prompts: int, seed: int) -> None:
        self.prompts = prompts
        count = max(_FEWEST, min(RESAMPLES, _ENTRIES // prompts))
        rng = np.random.default_rng(seed % 2**63)
        self.weights = np.empty((count, prompts))
        """(resamples, prompts) float64; each row sums to the number of prompts."""
        for row in self.weights:
            row[:] = np.bincount(rng.integers(0, prompts, prompts), minlength=prompts)

    def sums(self, by_prompt: np.ndarray) -> np.ndarray:
        """Sums over the prompts of each resample.

        Args:
            by_prompt: (prompts, …) numbers.

        Returns:
            (resamples, …) float64.
        """
        flat = by_prompt.reshape(self.prompts, -1)
        sums: np.ndarray = (self.weights @ flat).reshape(len(self.weights), *by_prompt.shape[1:])
        return sums


def interval(values: np.ndarray) -> list[float] | None:
    """The percentiles 2.5 and 97.5 of a measure over resamples; None where it is defined in none of them.

    Args:
        values: (resamples,) float64; NaN where a resample does not define it.
    """
    known = values[np.isfinite(values)]
    if not len(known):
        return None
    low, high = np.percentile(known, [2.5, 97.5])
    return [float(low), float(high)]


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, NaN where below is 0."""
    found: np.ndarray = np.divide(above, below, out=np.full(np.shape(below), np.nan), where=below > 0)
    return found


def by_group(groups: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """(count,) float64: the sum of the values of each group.

    Args:
        groups: (n,) the number of each value's group, below `count`.
        values: (n,) numbers.
    """
    return np.bincount(groups, weights=values, minlength=count).astype(np.float64)


def statistic_ci95(sums: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], seed: int) -> list[float] | None:
    """95 % confidence interval [low, high] of a statistic that is a function of the items' sums.

    Args:
        sums: (items, columns) float64, one or more items.
        statistic: from (draws, columns) to (draws,); NaN where a draw does not have it.
        seed: of the bootstrap.

    Returns:
        None where more than one draw in twenty does not have the statistic: too few items.
    """
    values = statistic(Resamples(len(sums), seed).sums(sums))
    return interval(values) if np.isfinite(values).mean() >= 0.95 else None


def column_ratio(sums: np.ndarray) -> np.ndarray:
    """Column 0 over column 1, (draws,); NaN where that is 0."""
    return ratio(sums[:, 0], sums[:, 1])


def r_squared(sums: np.ndarray) -> np.ndarray:
    """R² of a straight line from x to y: the squared Pearson correlation; NaN where x or y does not vary.

    Args:
        sums: (draws, 6): n, Σx, Σy, Σx², Σy², Σxy, of x and y that are centered near zero.
    """
    n, x, y, xx, yy, xy = sums.T
    with np.errstate(divide="ignore", invalid="ignore"):
        spread_x, spread_y = xx - x * x / n, yy - y * y / n
        # What rounding leaves of a spread of zero is no spread.
        varies = (spread_x > 1e-12 * xx) & (spread_y > 1e-12 * yy)
        return np.asarray(np.where(varies, (xy - x * y / n) ** 2 / (spread_x * spread_y), np.nan))
