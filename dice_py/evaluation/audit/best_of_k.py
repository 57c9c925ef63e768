"""A reward on scored or verifiable sets of K responses per prompt: PPE's metrics of correctness (arXiv 2410.14872).

PPE estimates best-of-K curves from 100 random orders of the responses. Here they are the exact expectations.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dice_py.evaluation.audit.data import AuditData, rows_of_prompts
from dice_py.evaluation.resampling import Figure, Resamples, by_group, interval, ratio


class BestOfK(NamedTuple):
    """Best-of-k curves, k from 1 to K, over the prompts that have K responses or more."""

    end_score: Figure
    """PPE's end score: the expected score of the best of K by reward."""
    max_score: Figure
    """PPE's maximum score: the highest value of the curve. Above the end score, the reward is over-optimized."""
    loss: Figure
    """PPE's loss: the mean over k of the squared distance from the curve that picks by the score itself."""
    curve: list[float]
    """The mean score of the response of the highest reward among k; `curve[0]` is that of a random response."""
    oracle: list[float]
    """The same for the highest score among k."""
    prompts: int


def usual_count(prompt: np.ndarray) -> int:
    """K: the number of responses that the most prompts have; of equally frequent ones the greater."""
    counts = np.bincount(np.bincount(prompt))
    return int(len(counts) - 1 - np.argmax(counts[::-1]))


def curves(prompt: np.ndarray, rewards: np.ndarray, score: np.ndarray, most: int) -> np.ndarray:
    """The expected score of the response of the highest reward among k of a prompt's, drawn without replacement.

    Of n responses in ascending order of reward, the one at place i (from 0) is the best of k with probability
    C(i, k−1) / C(n, k). Responses of equal reward are picked with equal probability.

    Args:
        prompt: (responses,) the number of each response's prompt.
        rewards, score: (responses,).
        most: K, 1 or more.

    Returns:
        (prompts, K) float64; NaN for prompts with fewer than K responses.
    """
    from scipy.special import gammaln

    found = []
    for rows in rows_of_prompts(prompt):
        n = len(rows)
        if n < most:
            found.append(np.full(most, np.nan))
            continue
        _, place, count = np.unique(rewards[rows], return_inverse=True, return_counts=True)
        means = np.bincount(place, weights=score[rows]) / count
        ascending = np.repeat(means, count)
        k, i = np.arange(1, most + 1)[:, None], np.arange(n)[None, :]
        # ln C(i, k−1) − ln C(n, k), where i is at least k − 1.
        free = np.maximum(i - k + 1, 0)
        logs = gammaln(i + 1) - gammaln(k) - gammaln(free + 1) - gammaln(n + 1) + gammaln(k + 1) + gammaln(n - k + 1)
        found.append(np.where(i >= k - 1, np.exp(logs), 0.0) @ ascending)
    return np.stack(found)


def best_of_k(data: AuditData, rewards: np.ndarray, most: int, resamples: Resamples) -> BestOfK:
    """PPE's best-of-K metrics: end score, maximum score and loss.

    Args:
        rewards: (responses,).
        most: K, two or more; prompts with fewer responses are left out.
    """
    assert data.score is not None
    ours = curves(data.prompt, rewards, data.score, most)
    best = curves(data.prompt, data.score, data.score, most)
    used = np.isfinite(ours[:, 0])
    count = used.astype(np.float64)
    means = [np.where(used[:, None], one, 0.0) for one in (ours, best)]
    totals = resamples.sums(count)[:, None]
    drawn, drawn_best = (ratio(resamples.sums(one), np.broadcast_to(totals, (len(totals), most))) for one in means)
    curve, oracle = (one.sum(axis=0) / count.sum() for one in means)
    return BestOfK(
        end_score=Figure(float(curve[-1]), interval(drawn[:, -1])),
        max_score=Figure(float(curve.max()), interval(drawn.max(axis=1))),
        loss=Figure(float(((oracle - curve) ** 2).mean()), interval(((drawn_best - drawn) ** 2).mean(axis=1))),
        curve=curve.tolist(),
        oracle=oracle.tolist(),
        prompts=int(used.sum()),
    )


def roc_auc(data: AuditData, rewards: np.ndarray, resamples: Resamples) -> Figure:
    """The area under the ROC curve of the rewards as scores of "right", over the responses of all prompts together.

    As in PPE, rewards are first scaled to [0, 1] within each prompt, so that those of different prompts can be
    compared; a prompt whose rewards are all equal gives 0.5.

    Args:
        data: of right (1) and wrong (0) responses; both occur.
        rewards: (responses,).
    """
    assert data.score is not None
    right = data.score == 1.0
    scaled = scaled_within_prompts(data.prompt, rewards)
    areas = _weighted_auc(data.prompt, right, scaled, np.vstack([np.ones(data.prompts), resamples.weights]))
    return Figure(float(areas[0]), interval(areas[1:]))


def scaled_within_prompts(prompt: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values scaled to [0, 1] within each prompt; 0.5 where a prompt's are all equal."""
    scaled = np.full(len(values), 0.5)
    for rows in rows_of_prompts(prompt):
        low, high = values[rows].min(), values[rows].max()
        if high > low:
            scaled[rows] = (values[rows] - low) / (high - low)
    return scaled


def _weighted_auc(prompt: np.ndarray, right: np.ndarray, scaled: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(draws,) the area in each draw, by `weights`, (draws, prompts): ties of right and wrong count half."""
    _, place = np.unique(scaled, return_inverse=True)
    levels = int(place.max()) + 1
    areas = np.empty(len(weights))
    for number, of_prompts in enumerate(weights):
        weight = of_prompts[prompt]
        positive, negative = (by_group(place, weight * side, levels) for side in (right, ~right))
        below = np.cumsum(negative) - negative / 2
        total = positive.sum() * negative.sum()
        areas[number] = positive @ below / total if total else np.nan
    return areas


def prompt_pearson(data: AuditData, rewards: np.ndarray, resamples: Resamples) -> Figure:
    """The mean over prompts of Pearson's correlation of reward and score within a prompt.

    Prompts whose rewards or scores are all equal define none, and are left out. It is no metric of PPE, whose row-wise
    correlation is of rows of win rates (models.py).

    Args:
        rewards: (responses,).
    """
    assert data.score is not None
    count = by_group(data.prompt, np.ones(len(rewards)), data.prompts)
    centered = [one - (by_group(data.prompt, one, data.prompts) / count)[data.prompt] for one in (rewards, data.score)]
    products = {
        (a, b): by_group(data.prompt, centered[a] * centered[b], data.prompts) for a, b in ((0, 1), (0, 0), (1, 1))
    }
    # By the values, not by a variance: rounding makes that of equal ones a little more than zero.
    varied = np.ones(data.prompts, dtype=bool)
    for values in (rewards, data.score):
        for number, rows in enumerate(rows_of_prompts(data.prompt)):
            varied[number] &= bool(values[rows].min() < values[rows].max())
    scale = np.sqrt(products[0, 0] * products[1, 1])
    varied &= scale > 0
    each = np.divide(products[0, 1], scale, out=np.zeros(data.prompts), where=varied)
    used = varied.astype(np.float64)
    if not used.sum():
        return Figure(None)
    drawn = ratio(resamples.sums(each * used), resamples.sums(used))
    return Figure(float((each * used).sum() / used.sum()), interval(drawn))
