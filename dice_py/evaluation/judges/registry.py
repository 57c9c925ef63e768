"""The table of judges. A judge is one file beside this one and one line here.

A judge compares the samples of two policies on the same prompts, and returns metrics by name.
"""

from __future__ import annotations

from typing import Any, Protocol

import polars as pl

from dice_py.evaluation.judges.oracle import oracle_metrics
from dice_py.evaluation.values import ItemValues


class Judge(Protocol):
    """Metrics of two policies' samples; `oracle_metrics` describes the arguments."""

    def __call__(
        self,
        prompts: pl.DataFrame,
        ours: pl.DataFrame,
        theirs: pl.DataFrame,
        rewards: pl.Series | None,
        seed: int,
        values: ItemValues | None = None,
    ) -> dict[str, Any]:
        """The metrics, ready for JSON."""
        ...


JUDGES: dict[str, Judge] = {"oracle": oracle_metrics}
"""By name. "oracle" judges prompts of the synthetic world only."""
