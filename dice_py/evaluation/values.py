"""The values of metrics by prompt or pair, from which rounds are compared: a paired difference needs each of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import polars as pl

from dice_py.errors import DataError
from dice_py.evaluation.metrics import bootstrap_ci95
from dice_py.storage.schemas import METRIC_VALUES


class ItemValues:
    """Collects the values of an evaluation's metrics, as rows of `METRIC_VALUES`."""

    def __init__(self) -> None:
        self._parts: list[pl.DataFrame] = []

    def add(
        self, metric: str, items: Iterable[int], values: Iterable[float], start: Iterable[float | None] | float
    ) -> None:
        """Adds a metric whose mean over the items is the metric of the evaluation.

        Args:
            metric: its name in the metrics.
            items: prompt_ids, or row numbers of the held-out pairs; the same in every round.
            values: of the evaluated policy, one for each item.
            start: the same of the policy that the run started from; or one number for all items.
        """
        part = pl.DataFrame({"metric": metric, "item": list(items), "value": list(values)})
        of_start = [start] * part.height if isinstance(start, int | float) else list(start)
        with_start = part.with_columns(pl.Series("start", of_start, dtype=pl.Float64))
        self._parts.append(with_start.cast(METRIC_VALUES))

    def frame(self) -> pl.DataFrame:
        """All rows so far: `metric`, `item`, `value`, `start`."""
        return pl.concat(self._parts) if self._parts else pl.DataFrame(schema=METRIC_VALUES)


class Change(NamedTuple):
    """A metric's difference between two policies on the same items."""

    mean: float
    ci95: list[float]
    """95 % confidence interval [low, high] of the mean, by a bootstrap over the items."""
    items: int

    @property
    def is_worse(self) -> bool:
        """Whether the complete interval lies below zero."""
        return self.ci95[1] < 0.0


def change(before: pl.DataFrame, after: pl.DataFrame, seed: int) -> Change:
    """The difference after − before of one metric, over the items that both have.

    Args:
        before, after: `item` and `value`, each item once.
        seed: of the bootstrap.

    Raises:
        DataError: no item is in both.
    """
    both = before.join(after, on="item", suffix="_after").sort("item")
    if both.is_empty():
        raise DataError("the two evaluations have no held-out prompt or pair in common, so they cannot be compared")
    differences = (both["value_after"] - both["value"]).to_list()
    return Change(sum(differences) / len(differences), bootstrap_ci95(differences, seed), len(differences))
