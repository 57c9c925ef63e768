"""Bootstrap intervals of statistics that are functions of sums over items: ratios, correlations.

The items (prompts, as a rule) are drawn with replacement; all rows of an item stay together, so that samples of one
prompt do not count as independent. Each draw needs the items' sums only, so 2000 draws are one product of matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from dice_py.evaluation.metrics import RESAMPLES

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Sums = npt.NDArray[np.float64]

DRAWS_AT_ONCE = 2**23
"""Counts that are in memory at one time."""


def resampled_sums(sums: Sums, seed: int) -> Sums:
    """(RESAMPLES, columns) float64: the sum of each column over as many items as there are, drawn with replacement.

    Args:
        sums: (items, columns) float64, one or more items.
        seed: 0 or more; the same seed gives the same draws.
    """
    import numpy as np

    items = len(sums)
    rng = np.random.default_rng(seed % 2**63)
    chances = np.full(items, 1.0 / items)
    step = max(1, DRAWS_AT_ONCE // items)
    parts = [
        rng.multinomial(items, chances, size=min(step, RESAMPLES - first)) @ sums for first in range(0, RESAMPLES, step)
    ]
    return np.concatenate(parts)


def statistic_ci95(sums: Sums, statistic: Callable[[Sums], Sums], seed: int) -> list[float] | None:
    """95 % confidence interval [low, high] of a statistic of the items' sums, by a percentile bootstrap.

    Args:
        sums: (items, columns) float64.
        statistic: from (draws, columns) to (draws,); NaN where a draw does not have it.
        seed: of the bootstrap.

    Returns:
        None where more than one draw in twenty does not have the statistic: too few items.
    """
    import numpy as np

    values = statistic(resampled_sums(sums, seed))
    values = values[np.isfinite(values)]
    if len(values) < 0.95 * RESAMPLES:
        return None
    low, high = np.percentile(values, [2.5, 97.5])
    return [float(low), float(high)]


def ratio(sums: Sums) -> Sums:
    """Column 0 over column 1; NaN where that is 0."""
    import numpy as np

    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(sums[:, 1] != 0, sums[:, 0] / sums[:, 1], np.nan))


def r_squared(sums: Sums) -> Sums:
    """R² of a straight line from x to y: the squared Pearson correlation; NaN where x or y does not vary.

    Args:
        sums: (draws, 6): n, Σx, Σy, Σx², Σy², Σxy, of x and y that are centered near zero.
    """
    import numpy as np

    n, x, y, xx, yy, xy = sums.T
    with np.errstate(divide="ignore", invalid="ignore"):
        spread_x, spread_y = xx - x * x / n, yy - y * y / n
        # What rounding leaves of a spread of zero is no spread.
        varies = (spread_x > 1e-12 * xx) & (spread_y > 1e-12 * yy)
        return np.asarray(np.where(varies, (xy - x * y / n) ** 2 / (spread_x * spread_y), np.nan))
