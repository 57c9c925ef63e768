"""How well a reward compares models: PPE's metrics of human preferences (arXiv 2410.14872) that need the models' names.

A battle is a comparison of responses of two models to the same prompt. The human preferences (or a set's scores) say
who wins it, and so does the reward. Both give a win rate of each model against each other one, and Bradley-Terry
strengths: the logistic regression of the wins on the two models, with scikit-learn's default penalty, on 100 resamples
of the prompts too, as Arena-Hard-Auto does (arXiv 2406.11939, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from dice_py.evaluation.audit.data import AuditData, rows_of_prompts
from dice_py.evaluation.resampling import Figure, Resamples, interval

if TYPE_CHECKING:
    from scipy.sparse import csr_array

ROUNDS = 100
_STEPS, _LONGEST_STEP, _CONVERGED = 100, 2.0, 1e-9
"""Of Newton's method: the most steps; the longest, since a first one from equal strengths may overshoot; the last."""
FEWEST_MODELS = 3
"""Below, a correlation over models says nothing."""


@dataclass(frozen=True)
class Battles:
    """Battles, as arrays of one entry each. Model `first` has the lower number."""

    prompt: np.ndarray
    first_response: np.ndarray
    second_response: np.ndarray
    pair: np.ndarray
    """int64: the number of the pair of models."""
    won: np.ndarray
    """float64: 1 where the first model's response is the better one, 0.5 for a tie, else 0."""
    pairs: np.ndarray
    """(pairs, 2) int64: the models of each pair that met."""
    models: int


def battles_of(data: AuditData) -> Battles | None:
    """The battles of an audit's data; None where no two known models met.

    Of a scored set these are all pairs of responses of different models to a prompt, equal scores being ties; of
    preference pairs, the pairs themselves.
    """
    if data.model is None:
        return None
    if data.score is None:
        one, two = data.comparisons.better, data.comparisons.worse
        won = np.ones(len(one))
    else:
        met = [np.triu_indices(len(rows), k=1) for rows in rows_of_prompts(data.prompt)]
        rows_of = rows_of_prompts(data.prompt)
        one = np.concatenate([rows[first] for rows, (first, _) in zip(rows_of, met, strict=True)])
        two = np.concatenate([rows[second] for rows, (_, second) in zip(rows_of, met, strict=True)])
        won = (data.score[one] > data.score[two]) + 0.5 * (data.score[one] == data.score[two])
    models = data.model[one], data.model[two]
    kept = (models[0] >= 0) & (models[1] >= 0) & (models[0] != models[1])
    if not kept.any():
        return None
    swapped = models[0] > models[1]
    first, second = np.where(swapped, two, one)[kept], np.where(swapped, one, two)[kept]
    won = np.where(swapped, 1.0 - won, won)[kept]
    sides = np.stack([data.model[first], data.model[second]], axis=1)
    pairs, pair = np.unique(sides, axis=0, return_inverse=True)
    return Battles(data.prompt[first], first, second, pair.reshape(-1), won, pairs, len(data.models))


@dataclass(frozen=True)
class Standings:
    """What one side (the human preferences, or a reward) says of the models."""

    strengths: np.ndarray
    """(models,) float64: Bradley-Terry strengths in log-odds, of mean 0."""
    drawn: np.ndarray
    """(resamples, models): the same in each resample."""
    rates: np.ndarray
    """(models, models): the win rate of each model (row) against each other; NaN where the two did not meet."""

    def separates(self) -> np.ndarray:
        """(models, models): +1 where the row's model is above the column's and their 95 % intervals do not overlap, −1
        where it is below, 0 where they overlap."""
        low, high = np.percentile(self.drawn, [2.5, 97.5], axis=0)
        above: np.ndarray = low[:, None] > high[None, :]
        found: np.ndarray = above.astype(np.int64) - above.T
        return found


def standings(battles: Battles, won: np.ndarray, resamples: Resamples) -> Standings:
    """Win rates and Bradley-Terry strengths, with those of resamples of the prompts.

    Args:
        won: (battles,) 1 where the first model wins, 0.5 for a tie, else 0.
    """
    games, wins = (_by_prompt(battles, values, resamples.prompts) for values in (np.ones(len(won)), won))
    weights = resamples.weights[:ROUNDS]
    drawn_games, drawn_wins = ((counts.T @ weights.T).T for counts in (games, wins))
    total, total_wins = games.sum(axis=0), wins.sum(axis=0)
    rates = np.full((battles.models, battles.models), np.nan)
    first, second = battles.pairs.T
    rates[first, second] = total_wins / total
    rates[second, first] = 1.0 - total_wins / total
    fitted = strengths(battles, np.vstack([total_wins, drawn_wins]), np.vstack([total, drawn_games]))
    return Standings(fitted[0], fitted[1:], rates)


def _by_prompt(battles: Battles, values: np.ndarray, prompts: int) -> csr_array:
    """(prompts, pairs) the sums of the values of each prompt's battles of each pair of models."""
    from scipy.sparse import csr_array

    return csr_array((values, (battles.prompt, battles.pair)), shape=(prompts, len(battles.pairs)))


def strengths(battles: Battles, wins: np.ndarray, games: np.ndarray) -> np.ndarray:
    """Bradley-Terry strengths in log-odds, of mean 0: log P(i beats j) / P(j beats i) = s_i − s_j.

    They are those of scikit-learn's `LogisticRegression(fit_intercept=False)`, which minimizes −log likelihood + ½·‖s‖²
    (the tests compare), by Newton's steps for all resamples at a time: single fits of thirty models would take minutes.

    Args:
        wins: (resamples, pairs of models) of the first model; a tie is half of one.
        games: (resamples, pairs of models).

    Returns:
        (resamples, models) float64.
    """
    from scipy.special import expit

    first, second = battles.pairs.T
    incidence = np.zeros((len(first), battles.models))
    rows = np.arange(len(first))
    incidence[rows, first], incidence[rows, second] = 1.0, -1.0
    found: np.ndarray = np.zeros((len(wins), battles.models))
    own = np.arange(battles.models)
    for _ in range(_STEPS):
        probability = expit(found @ incidence.T)
        slope = (wins - games * probability) @ incidence - found
        varied = games * probability * (1.0 - probability)
        curvature = np.zeros((len(wins), battles.models, battles.models))
        curvature[:, first, second] = curvature[:, second, first] = -varied
        curvature[:, own, own] = 1.0 - curvature.sum(axis=2)
        step = np.linalg.solve(curvature, slope[:, :, None])[:, :, 0]
        found += np.clip(step, -_LONGEST_STEP, _LONGEST_STEP)
        if np.abs(step).max() < _CONVERGED:
            break
    centered: np.ndarray = found - found.mean(axis=1, keepdims=True)
    return centered


def model_figures(human: Standings, reward: Standings) -> dict[str, Figure]:
    """PPE's metrics that compare models, over those that met another one.

    - `row_wise_pearson`: the mean over models of Pearson's correlation of a model's win rates against the others,
      human and by reward: of the rows of the two matrices of win rates.
    - `separability`: the share of pairs of models whose 95 % intervals of the reward's strengths do not overlap
      (Arena-Hard-Auto's separability with confidence).
    - `confidence_agreement`: over the pairs of models that the human preferences separate, the mean of 1 where the
      reward separates them in the same order, −1 where in the other, and 0 where it does not separate them.
    - `kendall_tau` and `spearman`: correlations of the strengths by human preferences and by reward.
    - `rank_brier`: the mean over pairs of models of (p − o)², where p is the share of resamples in which the reward has
      the first model above the second, and o is 1 where the human preferences have, 0 where they have it below.

    The last three have intervals over the same resamples of prompts for both sides; the others are themselves made of
    intervals, and have none.
    """
    from scipy.stats import kendalltau, spearmanr

    def correlations(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
        if np.ptp(ours) == 0 or np.ptp(theirs) == 0:  # as where a reward ties all responses
            return np.nan, np.nan
        return float(kendalltau(ours, theirs).statistic), float(spearmanr(ours, theirs).statistic)

    tau, rho = correlations(human.strengths, reward.strengths)
    drawn = np.array([correlations(*pair) for pair in zip(human.drawn, reward.drawn, strict=True)])
    pairs = list(combinations(range(len(human.strengths)), 2))
    known, said = human.separates(), reward.separates()
    separated = [float(said[pair] != 0) for pair in pairs]
    agreed = [float(known[pair] * said[pair]) for pair in pairs if known[pair]]
    squares = []
    for i, j in pairs:
        above = reward.drawn[:, i] - reward.drawn[:, j]
        probability = float(((above > 0) + 0.5 * (above == 0)).mean())
        squares.append((probability - float(np.heaviside(human.strengths[i] - human.strengths[j], 0.5))) ** 2)
    return {
        "row_wise_pearson": Figure(_row_wise_pearson(human.rates, reward.rates)),
        "separability": Figure(float(np.mean(separated))),
        "confidence_agreement": Figure(float(np.mean(agreed)) if agreed else None),
        "kendall_tau": Figure(tau if np.isfinite(tau) else None, interval(drawn[:, 0])),
        "spearman": Figure(rho if np.isfinite(rho) else None, interval(drawn[:, 1])),
        "rank_brier": Figure(float(np.mean(squares))),
    }


def _row_wise_pearson(human: np.ndarray, reward: np.ndarray) -> float | None:
    """The mean of the correlations of the rows that have three entries or more and vary on both sides."""
    found = []
    for ours, theirs in zip(human, reward, strict=True):
        met = np.isfinite(ours) & np.isfinite(theirs)
        if met.sum() >= FEWEST_MODELS and np.ptp(ours[met]) > 0 and np.ptp(theirs[met]) > 0:
            found.append(np.corrcoef(ours[met], theirs[met])[0, 1])
    return float(np.mean(found)) if found else None
