"""Metrics that compare models: win rates, Bradley-Terry strengths, correlations, and what intervals say of pairs."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from audit_data import pairs, scored
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from property_examples import examples
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from dice_py.evaluation.audit.data import AuditData
from dice_py.evaluation.audit.models import Battles, Standings, battles_of, model_figures, standings, strengths
from dice_py.evaluation.resampling import Resamples

SETS = st.lists(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=5), min_size=1, max_size=6
)
"""For each prompt (model, score) of its responses."""


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SETS)
def test_battles_are_pairs_of_different_models(sets: list[list[tuple[int, int]]]) -> None:
    prompt = [number for number, rows in enumerate(sets) for _ in rows]
    model, score = ([row[at] for rows in sets for row in rows] for at in (0, 1))
    battles = battles_of(scored(prompt, score, model=model))
    expected = {}
    for i, j in combinations(range(len(prompt)), 2):
        if prompt[i] == prompt[j] and model[i] != model[j]:
            first, second = (i, j) if model[i] < model[j] else (j, i)
            won = 1.0 if score[first] > score[second] else 0.5 if score[first] == score[second] else 0.0
            expected[first, second] = (prompt[i], model[first], model[second], won)
    if not expected:
        assert battles is None
        return
    assert battles is not None
    rows = zip(battles.first_response, battles.second_response, battles.prompt, battles.pair, battles.won, strict=True)
    found = {(int(a), int(b)): (int(p), *battles.pairs[n].tolist(), float(w)) for a, b, p, n, w in rows}
    assert found == expected


def test_battles_of_preference_pairs() -> None:
    data = pairs([5, 6, 7, 8], [6, 7, 8, 9])
    named = AuditData(
        data.prompt, data.tokens, data.comparisons, None, np.array([1, 0, 0, 2, 2, 2, -1, 1]), ("a", "b", "c")
    )
    battles = battles_of(named)
    assert battles is not None
    # The first is won by b over a, the second by a over c; c against c, and a model that is not known, are none.
    assert battles.pairs[battles.pair].tolist() == [[0, 1], [0, 2]]
    assert battles.won.tolist() == [0.0, 1.0]
    assert battles.first_response.tolist() == [1, 2]
    assert battles_of(data) is None


def totals(battles: Battles, won: np.ndarray, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Wins and games of each pair of models, in one row."""
    weight = np.ones(len(won)) if weights is None else weights
    counts = (np.bincount(battles.pair, weights=weight * one, minlength=len(battles.pairs)) for one in (won, won**0))
    wins, games = counts
    return wins[None], games[None]


@settings(max_examples=examples(25), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SETS)
def test_strengths_are_those_of_a_plain_fit(sets: list[list[tuple[int, int]]]) -> None:
    """The maximum of the likelihood with the penalty ½·‖s‖², found by SciPy."""
    prompt = [number for number, rows in enumerate(sets) for _ in rows]
    model, score = ([row[at] for rows in sets for row in rows] for at in (0, 1))
    battles = battles_of(scored(prompt, score, model=model))
    if battles is None:
        return
    first, second = battles.pairs[battles.pair].T

    def loss(s: np.ndarray) -> float:
        margin = s[first] - s[second]
        likelihood = battles.won * np.logaddexp(0, -margin) + (1 - battles.won) * np.logaddexp(0, margin)
        return float(likelihood.sum() + 0.5 * s @ s)

    expected = minimize(loss, np.zeros(battles.models), method="BFGS", options={"gtol": 1e-9}).x
    assert strengths(battles, *totals(battles, battles.won))[0] == pytest.approx(expected - expected.mean(), abs=1e-4)


@pytest.mark.parametrize("games", [3, 100_000])
@pytest.mark.parametrize("one_sided", [False, True])
def test_strengths_are_scikit_learns(games: int, one_sided: bool) -> None:
    """Of many games, too, and where every model beats all that come after it."""
    rng = np.random.default_rng(0)
    pairs_of = np.array(list(combinations(range(7), 2)))
    at = rng.normal(size=7)
    chance = 1 / (1 + np.exp(at[pairs_of[:, 1]] - at[pairs_of[:, 0]]))
    wins = np.full(21, float(games)) if one_sided else rng.binomial(games, chance).astype(float)
    empty = np.zeros(0, dtype=int)
    battles = Battles(empty, empty, empty, empty, np.zeros(0), pairs_of, 7)
    x = np.zeros((21, 7))
    x[np.arange(21), pairs_of[:, 0]], x[np.arange(21), pairs_of[:, 1]] = 1, -1
    # Each game from both sides, at half its weight, so that both outcomes occur.
    weight = np.concatenate([wins, wins, games - wins, games - wins]) / 2
    kept = weight > 0
    rows, outcome = np.concatenate([x, -x, x, -x]), np.repeat([1, 0, 0, 1], 21)
    model = LogisticRegression(fit_intercept=False, solver="newton-cholesky", tol=1e-10)
    expected = model.fit(rows[kept], outcome[kept], sample_weight=weight[kept]).coef_[0]
    found = strengths(battles, np.stack([wins, wins / 2]), np.full((2, 21), float(games)))
    assert found[0] == pytest.approx(expected - expected.mean(), abs=1e-5)
    assert found[1] != pytest.approx(found[0], abs=1e-3)  # each row has strengths of its own


def arena(models: int, prompts: int, seed: int, noise: float) -> tuple[AuditData, np.ndarray, np.ndarray]:
    """Every model answers every prompt; better models have higher numbers. Scores, and a reward of `noise` more."""
    rng = np.random.default_rng(seed)
    prompt, model = np.repeat(np.arange(prompts), models), np.tile(np.arange(models), prompts)
    score = model + rng.normal(size=len(model))
    data = scored(prompt.tolist(), score.tolist(), model=model.tolist())
    return data, score, score + noise * rng.normal(size=len(score))


def figures_of(data: AuditData, rewards: np.ndarray) -> dict[str, float | None]:
    battles, resamples = battles_of(data), Resamples(data.prompts, 0)
    assert battles is not None
    won = (rewards[battles.first_response] > rewards[battles.second_response]).astype(float)
    human, ours = (standings(battles, side, resamples) for side in (battles.won, won))
    return {name: figure.value for name, figure in model_figures(human, ours).items()}


def test_a_reward_that_agrees_and_one_that_does_not() -> None:
    data, score, noisy = arena(5, 150, 0, noise=0.5)
    same = figures_of(data, score)
    assert same["row_wise_pearson"] == pytest.approx(1.0)
    assert same["kendall_tau"] == same["spearman"] == pytest.approx(1.0)
    assert same["separability"] == same["confidence_agreement"] == 1.0
    assert same["rank_brier"] == 0.0
    close = figures_of(data, noisy)
    assert close["spearman"] == pytest.approx(1.0)
    assert close["row_wise_pearson"] is not None
    assert 0.9 < close["row_wise_pearson"] < 1.0
    reversed_ = figures_of(data, -score)
    assert reversed_["kendall_tau"] == reversed_["spearman"] == pytest.approx(-1.0)
    assert reversed_["confidence_agreement"] == -1.0
    assert reversed_["rank_brier"] == 1.0
    blind = figures_of(data, np.random.default_rng(9).normal(size=len(score)))
    assert blind["separability"] is not None
    assert blind["separability"] < 0.5
    assert blind["rank_brier"] is not None
    assert 0.05 < blind["rank_brier"] < 0.75


def test_what_intervals_say_of_pairs_by_hand() -> None:
    """Three models. Human: a above b above c, all apart. Reward: a and b overlap, c is apart and on top."""
    at = np.linspace(-0.1, 0.1, 100)[:, None]
    human = Standings(np.array([1.0, 0.0, -1.0]), np.array([1.0, 0.0, -1.0]) + at, np.full((3, 3), np.nan))
    wide = np.stack([0.1 + np.linspace(-1, 1, 100), np.linspace(1, -1, 100), np.full(100, 3.0)], axis=1)
    reward = Standings(np.array([0.1, 0.0, 3.0]), wide, np.full((3, 3), np.nan))
    found = {name: figure.value for name, figure in model_figures(human, reward).items()}
    assert found["separability"] == pytest.approx(2 / 3)
    assert found["confidence_agreement"] == pytest.approx((0 - 1 - 1) / 3)
    above = float((wide[:, 0] > wide[:, 1]).mean())
    assert found["rank_brier"] == pytest.approx(((above - 1) ** 2 + 1 + 1) / 3)
    assert found["kendall_tau"] == pytest.approx(-1 / 3)
    assert found["row_wise_pearson"] is None
    unsure = Standings(human.strengths, wide, human.rates)
    overlapping = Standings(np.zeros(3), np.zeros((100, 3)), human.rates)
    assert model_figures(overlapping, unsure)["confidence_agreement"].value is None


def test_win_rates_and_their_rows_by_hand() -> None:
    data, score, noisy = arena(4, 60, 3, noise=2.0)
    battles = battles_of(data)
    assert battles is not None
    won = (noisy[battles.first_response] > noisy[battles.second_response]).astype(float)
    resamples = Resamples(60, 0)
    human, ours = (standings(battles, side, resamples) for side in (battles.won, won))
    rows = []
    for values, found in ((score, human.rates), (noisy, ours.rates)):
        by_model = values.reshape(60, 4)
        expected = [
            [(by_model[:, i] > by_model[:, j]).mean() if i != j else np.nan for j in range(4)] for i in range(4)
        ]
        assert found == pytest.approx(np.array(expected), nan_ok=True)
        rows.append(expected)
    correlations = [
        np.corrcoef([a for a in ours_of if a == a], [b for b in theirs_of if b == b])[0, 1]
        for ours_of, theirs_of in zip(*rows, strict=True)
    ]
    assert model_figures(human, ours)["row_wise_pearson"].value == pytest.approx(np.mean(correlations))
    # The strengths of a resample are those of its games.
    weights = resamples.weights[7][battles.prompt]
    assert ours.drawn[7] == pytest.approx(strengths(battles, *totals(battles, won, weights))[0], abs=1e-6)
