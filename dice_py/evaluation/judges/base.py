"""The interface of judges, which say which of two responses to a prompt is better.

A judge is a frozen, picklable dataclass of its settings; what it needs (models, a client) it loads on first use. One
that scores each response alone is a `ScoringJudge`; one that looks at two at a time is a `PairwiseJudge`.
evaluation/comparison.py makes win rates of either.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import polars as pl

from dice_py.events import Report, no_report


class Judge(ABC):
    """A judge of responses to prompts.

    Frames of prompts have `prompt_id` and `messages` (storage.schemas.MESSAGES), each prompt once. Frames of samples
    have `prompt_id` and `response` (text), and may have further columns.
    """

    name: ClassVar[str]
    """Begins the names of its metrics: lower-case letters and underscores."""

    @abstractmethod
    def key_fields(self) -> dict[str, Any]:
        """All that decides its verdicts, by name (JSON values): models by identity, templates by content, settings."""


class ScoringJudge(Judge):
    """A judge that scores one response at a time. Of two responses the one with the higher score wins."""

    @abstractmethod
    def scores(self, prompts: pl.DataFrame, samples: pl.DataFrame, report: Report = no_report) -> pl.Series:
        """The score of each row of `samples`, Float64, finite; more is better.

        Raises:
            DataError: a response cannot be scored.
            JudgeError: the judge cannot be reached, or its budget is spent.
        """


class PairwiseJudge(Judge):
    """A judge that compares two responses."""

    @abstractmethod
    def preferences(
        self, prompts: pl.DataFrame, ours: pl.DataFrame, theirs: pl.DataFrame, report: Report = no_report
    ) -> pl.Series:
        """For each row, the probability in [0, 1] that `ours` is better than `theirs`, Float64; 0.5 is a tie.

        Args:
            ours, theirs: as many rows in both; rows at the same place are responses to the same prompt.

        Raises:
            DataError: a response cannot be judged.
            JudgeError: the judge cannot be reached, or its budget is spent.
        """
