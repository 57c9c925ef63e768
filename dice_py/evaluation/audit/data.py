"""What an audit measures rewards on: responses, and comparisons of two responses to the same prompt."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl

from dice_py.evaluation.slices import pair_slices


@dataclass(frozen=True)
class Comparisons:
    """Pairs of responses of which one is known to be the better. Arrays of one entry per comparison."""

    better: np.ndarray
    """int64, the number of the response."""
    worse: np.ndarray
    weight: np.ndarray
    """float64. A preference pair weighs 1; the comparisons of a scored set's prompt weigh 1 together."""
    source: pl.Series | None = None
    """Text or null; None: the data have no sources."""

    def __len__(self) -> int:
        return len(self.better)


@dataclass(frozen=True)
class AuditData:
    """Responses with what is known of them. Arrays of one entry per response."""

    prompt: np.ndarray
    """int64: the number of its prompt; prompts count from 0 without gaps."""
    tokens: np.ndarray
    """int64: its length, with the token that ends it."""
    comparisons: Comparisons
    score: np.ndarray | None = None
    """float64, of a scored set; None: preference pairs, whose responses are not scored."""
    model: np.ndarray | None = None
    """int64: the number of the model that wrote it, −1 where that is not known; None: no models are known."""
    models: tuple[str, ...] = ()

    @cached_property
    def prompts(self) -> int:
        """The number of prompts."""
        return int(self.prompt.max()) + 1

    @property
    def is_scored(self) -> bool:
        """Whether it is a scored set, not preference pairs."""
        return self.score is not None

    @property
    def is_verifiable(self) -> bool:
        """Whether its scores say right (1) or wrong (0)."""
        return self.score is not None and bool(np.isin(self.score, (0.0, 1.0)).all())

    @cached_property
    def compared_prompt(self) -> np.ndarray:
        """(comparisons,) the prompt of each comparison."""
        found: np.ndarray = self.prompt[self.comparisons.better]
        return found

    @cached_property
    def slices(self) -> dict[str, np.ndarray]:
        """Which comparisons are in each slice (`pair_slices`), as Boolean arrays by name."""
        lengths = [
            pl.Series(self.tokens[side], dtype=pl.Int64) for side in (self.comparisons.better, self.comparisons.worse)
        ]
        members = pair_slices(lengths[0], lengths[1], self.comparisons.source)
        return {name: inside.to_numpy() for name, inside in members.items()}

    def outcomes(self, rewards: np.ndarray) -> np.ndarray:
        """(comparisons,) float64: 1 where the better response has the higher reward, 0.5 for a tie, else 0."""
        better, worse = rewards[self.comparisons.better], rewards[self.comparisons.worse]
        found: np.ndarray = (better > worse) + 0.5 * (better == worse)
        return found


def comparisons_of_scores(prompt: np.ndarray, score: np.ndarray) -> Comparisons:
    """All pairs of responses to the same prompt that have different scores; those of a prompt weigh 1 together.

    PPE (arXiv 2410.14872) samples some such pairs per prompt, and takes the mean over prompts. Here are all of them.

    Args:
        prompt: (n,) the number of each response's prompt.
        score: (n,) its score.
    """
    better: list[np.ndarray] = []
    worse: list[np.ndarray] = []
    weight: list[np.ndarray] = []
    for rows in rows_of_prompts(prompt):
        first, second = np.triu_indices(len(rows), k=1)
        first, second = rows[first], rows[second]
        is_first = score[first] > score[second]
        differ = score[first] != score[second]
        better.append(np.where(is_first, first, second)[differ])
        worse.append(np.where(is_first, second, first)[differ])
        found = int(differ.sum())
        weight.append(np.full(found, 1.0 / found if found else 0.0))
    return Comparisons(*(np.concatenate(parts) for parts in (better, worse, weight)))


def rows_of_prompts(prompt: np.ndarray) -> list[np.ndarray]:
    """The numbers of the responses to each prompt, in the order of the prompts."""
    order = np.argsort(prompt, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(prompt[order])) + 1)
