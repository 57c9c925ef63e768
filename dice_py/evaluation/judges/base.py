"""The interface of judges, which say which of two responses to a prompt is better.

A judge is a frozen, picklable dataclass of its settings; what it needs (models, a client) it loads on first use. One
that scores each response alone is a `ScoringJudge`; one that looks at two at a time is a `PairwiseJudge`.
evaluation/comparison.py makes win rates of either.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import polars as pl

from dice_py.data import Message
from dice_py.events import Report, no_report
from dice_py.storage.schemas import PLACE


class Judge(ABC):
    """A judge of responses to prompts.

    Frames of prompts have `prompt_id` and `messages` (storage.schemas.MESSAGES), each prompt once. Frames of samples
    have `prompt_id` and `response` (text), and may have further columns.
    """

    name: ClassVar[str]
    """Begins the names of its metrics: lower-case letters and underscores."""

    @property
    def annotator(self) -> str:
        """What annotations call it."""
        return f"dice_{self.name}"

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

        Null is no verdict: the judge was asked, and its answer cannot be read.

        Args:
            ours, theirs: as many rows in both; rows at the same place are responses to the same prompt.

        Raises:
            DataError: a response cannot be judged.
            JudgeError: the judge cannot be reached, or its budget is spent.
        """

    def verdicts(
        self, prompts: pl.DataFrame, ours: pl.DataFrame, theirs: pl.DataFrame, report: Report = no_report
    ) -> Verdicts:
        """The preferences, and what the judge counted on the way. Arguments and errors as of `preferences`."""
        return Verdicts(self.preferences(prompts, ours, theirs, report), {})


class Verdicts(NamedTuple):
    """What a judge says of pairs of responses."""

    preferences: pl.Series
    """As of `PairwiseJudge.preferences`."""
    counts: dict[str, Any]
    """What it counted, ready for JSON: agreement of the two orders, requests, tokens, cost."""


def conversations(prompts: pl.DataFrame, samples: pl.DataFrame) -> Iterator[tuple[str, list[Message], list[Message]]]:
    """For each row of `samples`: what errors call it, the messages of its prompt, and the response as one turn."""
    messages = dict(prompts.select("prompt_id", "messages").iter_rows())
    rows = samples.select("prompt_id", "response").iter_rows()
    for place, (prompt_id, text) in zip(places(samples), rows, strict=True):
        yield place, messages[prompt_id], [{"role": "assistant", "content": text}]


def places(samples: pl.DataFrame) -> list[str]:
    """What errors call each response: its place in the user's files, or its row and prompt where that is not known."""
    if PLACE in samples.columns:
        return samples[PLACE].to_list()
    return [f"response {row} (prompt {prompt_id})" for row, prompt_id in enumerate(samples["prompt_id"])]
