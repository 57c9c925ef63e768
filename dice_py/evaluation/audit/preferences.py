"""Agreement of a reward with comparisons: accuracy, on all and on slices, against length, and the Brier score.

Intervals are percentile bootstraps over prompts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import polars as pl

from dice_py.evaluation.audit.data import AuditData
from dice_py.evaluation.resampling import Figure, Resamples, by_group, interval, ratio
from dice_py.evaluation.slices import CHOSEN_LONGER, CHOSEN_SHORTER, MINIMUM_PAIRS, accuracy_interval
from dice_py.storage.keys import seed_for


class Agreement(NamedTuple):
    """How a reward's outcomes agree with the comparisons."""

    accuracy: Figure
    balanced: Figure
    """The mean of the accuracies where the better response is the longer one, and where it is the shorter one."""
    slices: list[dict[str, Any]]
    """`slice`, `pairs`, `accuracy`, and its interval `ci95`, which is None below 20 pairs."""
    resampled: np.ndarray
    """(resamples,) the accuracy of each resample."""

    def of(self, name: str) -> dict[str, Any] | None:
        """A slice that has an interval; None if there is none of that name."""
        return next((entry for entry in self.slices if entry["slice"] == name and entry["ci95"] is not None), None)


def agreement(data: AuditData, outcomes: np.ndarray, resamples: Resamples, seed: int) -> Agreement:
    """Accuracy and length-balanced accuracy of a reward, and its accuracy on each slice.

    Accuracy is the share of comparisons whose better response has the higher reward; ties count half (PPE, arXiv
    2410.14872, section 4: accuracy on human preferences; section 5: on pairs of a right and a wrong response). The
    comparisons of a scored set's prompt weigh 1 together. The length-balanced accuracy of a reward that is a function
    of length alone, growing or falling, is one half.

    Args:
        outcomes: (comparisons,) of `AuditData.outcomes`.
        seed: of the intervals where all outcomes are equal.
    """
    names = list(data.slices)
    weight, groups = data.comparisons.weight, data.compared_prompt
    inside = [np.ones(len(weight), dtype=bool), *(data.slices[name] for name in names)]
    right = np.stack([by_group(groups[one], (weight * outcomes)[one], data.prompts) for one in inside], axis=1)
    all_of = np.stack([by_group(groups[one], weight[one], data.prompts) for one in inside], axis=1)
    values = ratio(right.sum(axis=0), all_of.sum(axis=0))
    drawn = ratio(resamples.sums(right), resamples.sums(all_of))

    def bounds(column: int) -> list[float] | None:
        kept = outcomes[inside[column]]
        if len(np.unique(kept)) == 1:
            # Every resample is equal. The prompts are what is independent, so that they are counted, not the pairs.
            independent = len(np.unique(groups[inside[column]]))
            return accuracy_interval(pl.Series(np.full(independent, kept[0])), seed_for(seed, column))
        return interval(drawn[:, column])

    slices = []
    for number, name in enumerate(names, start=1):
        pairs = int(inside[number].sum())
        known = bounds(number) if pairs >= MINIMUM_PAIRS else None
        slices.append({"slice": name, "pairs": pairs, "accuracy": float(values[number]), "ci95": known})
    return Agreement(Figure(float(values[0]), bounds(0)), _balanced(names, values, drawn), slices, drawn[:, 0])


def _balanced(names: list[str], values: np.ndarray, drawn: np.ndarray) -> Figure:
    if CHOSEN_LONGER not in names or CHOSEN_SHORTER not in names:
        return Figure(None)
    columns = [1 + names.index(name) for name in (CHOSEN_LONGER, CHOSEN_SHORTER)]
    return Figure(float(values[columns].mean()), interval(drawn[:, columns].mean(axis=1)))


def brier(data: AuditData, rewards: np.ndarray, resamples: Resamples) -> Figure:
    """Mean of (1 − σ(r_better − r_worse))²: the Brier score of the probabilities that DPO's model of preferences gives.

    σ(r_w − r_l) is the Bradley-Terry probability of Rafailov et al. (arXiv 2305.18290, equation 6). A reward of zeros
    has 0.25; less is better. PPE's Brier score is another one, of the ranks of models (models.py).

    Args:
        rewards: (responses,) in units of log-odds: β times the sum of log-ratios.
    """
    from scipy.special import expit

    comparisons = data.comparisons
    squares = expit(rewards[comparisons.worse] - rewards[comparisons.better]) ** 2
    above = by_group(data.compared_prompt, comparisons.weight * squares, data.prompts)
    below = by_group(data.compared_prompt, comparisons.weight, data.prompts)
    drawn = ratio(resamples.sums(above), resamples.sums(below))
    return Figure(float(above.sum() / below.sum()), interval(drawn))
