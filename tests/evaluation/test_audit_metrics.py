"""The figures of an audit against naive computations of the same: by counting, by all subsets, by scikit-learn."""

from __future__ import annotations

import math
import random
from itertools import combinations

import numpy as np
import pytest
from audit_data import pairs, scored
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from property_examples import examples
from scipy.stats import pearsonr
from sklearn.metrics import roc_auc_score

from dice_py.evaluation.audit.best_of_k import (
    best_of_k,
    curves,
    prompt_pearson,
    roc_auc,
    scaled_within_prompts,
    usual_count,
)
from dice_py.evaluation.audit.data import comparisons_of_scores
from dice_py.evaluation.audit.preferences import agreement, brier
from dice_py.evaluation.resampling import Resamples, by_group, interval, ratio

SETS = st.lists(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=2, max_size=6), min_size=1, max_size=6
)
"""For each prompt the (reward, score) of its responses; small numbers, so that many are equal."""


def flat(sets: list[list[tuple[int, int]]]) -> tuple[list[int], np.ndarray, list[float]]:
    prompt = [number for number, rows in enumerate(sets) for _ in rows]
    return prompt, np.array([r for rows in sets for r, _ in rows], dtype=float), [s for rows in sets for _, s in rows]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SETS)
def test_comparisons_of_scores_are_all_pairs_that_differ(sets: list[list[tuple[int, int]]]) -> None:
    prompt, _, score = flat(sets)
    found = comparisons_of_scores(np.array(prompt), np.array(score, dtype=float))
    expected = {
        (i, j) if score[i] > score[j] else (j, i)
        for i, j in combinations(range(len(prompt)), 2)
        if prompt[i] == prompt[j] and score[i] != score[j]
    }
    assert set(zip(found.better.tolist(), found.worse.tolist(), strict=True)) == expected
    assert len(found) == len(expected)
    of_prompt = by_group(np.array(prompt)[found.better], found.weight, len(sets))
    assert all(total == pytest.approx(1.0) or total == 0.0 for total in of_prompt)


@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SETS)
def test_accuracy_of_scored_sets_is_the_mean_over_prompts(sets: list[list[tuple[int, int]]]) -> None:
    prompt, rewards, score = flat(sets)
    data = scored(prompt, score)
    if not len(data.comparisons):
        return
    found = agreement(data, data.outcomes(rewards), Resamples(len(sets), 0), 0)
    by_prompt = []
    for rows in sets:
        right = [
            1.0 if (a[0] - b[0]) * (a[1] - b[1]) > 0 else 0.5 if a[0] == b[0] else 0.0
            for a, b in combinations(rows, 2)
            if a[1] != b[1]
        ]
        by_prompt += [sum(right) / len(right)] if right else []
    assert found.accuracy.value == pytest.approx(sum(by_prompt) / len(by_prompt))
    assert found.balanced.value is None  # all are of one length
    assert found.accuracy.ci95 is not None
    assert -1e-9 <= found.accuracy.ci95[0] <= found.accuracy.value + 1e-9 <= found.accuracy.ci95[1] + 2e-9


LENGTHS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 3), st.integers(0, 3)), min_size=1)


@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(LENGTHS)
def test_accuracy_of_pairs_and_of_slices(rows: list[tuple[int, int, int, int]]) -> None:
    data = pairs([row[0] for row in rows], [row[1] for row in rows])
    rewards = np.array([value for row in rows for value in row[2:]], dtype=float)
    found = agreement(data, data.outcomes(rewards), Resamples(len(rows), 0), 0)
    right = [1.0 if b > w else 0.5 if b == w else 0.0 for *_, b, w in rows]
    assert found.accuracy.value == pytest.approx(sum(right) / len(right))
    sides = {}
    for name, sign in (("chosen longer", 1), ("chosen shorter", -1), ("equal length", 0)):
        inside = [one for one, (b, w, *_) in zip(right, rows, strict=True) if (b > w) - (b < w) == sign]
        entry = next((each for each in found.slices if each["slice"] == name), None)
        assert (entry is None) is (not inside)
        if entry is not None:
            assert (entry["pairs"], entry["accuracy"]) == (len(inside), pytest.approx(sum(inside) / len(inside)))
            assert (entry["ci95"] is None) is (len(inside) < 20)
            sides[name] = entry["accuracy"]
    if {"chosen longer", "chosen shorter"} <= sides.keys():
        assert found.balanced.value == pytest.approx((sides["chosen longer"] + sides["chosen shorter"]) / 2)
    else:
        assert found.balanced.value is None


def test_brier_is_of_the_probabilities_of_bradley_terry() -> None:
    data = pairs([3, 4, 5], [5, 4, 3], prompt=[0, 0, 1])
    rewards = np.array([1.0, 0.0, -0.5, 2.0, 0.3, 0.3])
    expected = [(1 - 1 / (1 + math.exp(w - b))) ** 2 for b, w in ((1.0, 0.0), (-0.5, 2.0), (0.3, 0.3))]
    found = brier(data, rewards, Resamples(2, 0))
    assert found.value == pytest.approx(sum(expected) / 3)
    assert found.ci95 == pytest.approx([0.25, (expected[0] + expected[1]) / 2])  # either prompt alone
    assert brier(data, np.array([800.0, -800.0] * 3), Resamples(2, 0)).value == 0.0  # no overflow


def best_of_subsets(rows: list[tuple[int, int]], most: int) -> list[float]:
    """By all subsets of k responses: the mean score of those of the highest reward."""
    curve = []
    for k in range(1, most + 1):
        picked = []
        for subset in combinations(rows, k):
            top = max(reward for reward, _ in subset)
            best = [score for reward, score in subset if reward == top]
            picked.append(sum(best) / len(best))
        curve.append(sum(picked) / len(picked))
    return curve


@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SETS)
def test_curves_are_those_of_all_subsets(sets: list[list[tuple[int, int]]]) -> None:
    prompt, rewards, score = flat(sets)
    most = usual_count(np.array(prompt))
    assert sorted(len(rows) for rows in sets).count(most) == max(
        [len(rows) for rows in sets].count(n) for n in range(2, 7)
    )
    found = curves(np.array(prompt), rewards, np.array(score, dtype=float), most)
    for rows, curve in zip(sets, found, strict=True):
        if len(rows) < most:
            assert np.isnan(curve).all()
        else:
            assert curve.tolist() == pytest.approx(best_of_subsets(rows, most))


def test_best_of_k_of_known_rewards() -> None:
    # Two prompts of three responses: the reward picks the best of the first, and the worst of the second.
    data = scored([0, 0, 0, 1, 1, 1], [1.0, 0.0, 0.0, 0.0, 1.0, 1.0])
    found = best_of_k(data, np.array([3.0, 2.0, 1.0, 3.0, 2.0, 1.0]), 3, Resamples(2, 0))
    assert found.curve == pytest.approx([0.5, (2 / 3 + 1 / 3) / 2, 0.5])
    assert found.oracle == pytest.approx([0.5, (2 / 3 + 1) / 2, 1.0])
    assert found.end_score.value == pytest.approx(0.5)
    assert found.max_score.value == pytest.approx(0.5)
    assert found.loss.value == pytest.approx(((5 / 6 - 1 / 2) ** 2 + 0.25) / 3)
    assert found.end_score.ci95 == pytest.approx([0.0, 1.0])
    assert found.prompts == 2
    perfect = best_of_k(data, data.score, 3, Resamples(2, 0))  # type: ignore[arg-type]
    assert perfect.loss.value == pytest.approx(0.0, abs=1e-15)
    assert perfect.curve == perfect.oracle


def test_curves_of_many_responses_do_not_overflow() -> None:
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=3000)
    found = curves(np.zeros(3000, dtype=int), rewards, rewards, 2000)[0]
    assert np.isfinite(found).all()
    assert found[0] == pytest.approx(rewards.mean())
    assert (np.diff(found) > -1e-9).all()


def test_prompts_with_fewer_responses_are_left_out() -> None:
    data = scored([0, 0, 0, 1, 1, 2, 2, 2], [1.0, 0, 0, 1, 0, 0, 0, 1])
    found = best_of_k(data, np.array([1.0, 0, 0, 0, 1, 0, 0, 1]), 3, Resamples(3, 0))
    assert (found.prompts, found.end_score.value) == (2, 1.0)


@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SETS)
def test_roc_auc_counts_pairs_of_right_and_wrong(sets: list[list[tuple[int, int]]]) -> None:
    prompt, rewards, score = flat([[(r, s % 2) for r, s in rows] for rows in sets])
    if len(set(score)) < 2:
        return
    data = scored(prompt, score)
    scaled = scaled_within_prompts(data.prompt, rewards)
    for rows in ([i for i in range(len(prompt)) if prompt[i] == number] for number in range(len(sets))):
        values = rewards[rows]
        width = values.max() - values.min()
        assert scaled[rows].tolist() == pytest.approx(
            ((values - values.min()) / width).tolist() if width else [0.5] * len(rows)
        )
    resamples = Resamples(len(sets), 0)
    found = roc_auc(data, rewards, resamples)
    right, wrong = scaled[np.array(score) == 1], scaled[np.array(score) == 0]
    above = [1.0 if a > b else 0.5 if a == b else 0.0 for a in right for b in wrong]
    assert found.value == pytest.approx(sum(above) / len(above))
    # The interval is that of scikit-learn's areas with the weights of each resample.
    drawn = []
    for weights in resamples.weights[:: len(resamples.weights) // 40]:
        weight = weights[data.prompt]
        both = {side for side, w in zip(score, weight, strict=True) if w}
        if len(both) == 2:
            drawn.append(roc_auc_score(np.array(score) == 1, scaled, sample_weight=weight))
    if drawn:
        assert found.ci95 is not None
        assert found.ci95[0] <= np.median(drawn) + 0.2
        assert min(drawn) <= found.ci95[1] + 1e-9


@pytest.mark.long
def test_the_interval_of_the_area_is_of_weighted_areas() -> None:
    rng = np.random.default_rng(3)
    prompt = np.repeat(np.arange(40), 5)
    right = rng.integers(0, 2, 200).astype(float)
    rewards = right + rng.normal(size=200)
    data, resamples = scored(prompt.tolist(), right.tolist()), Resamples(40, 1)
    scaled = scaled_within_prompts(prompt, rewards)
    areas = [roc_auc_score(right == 1, scaled, sample_weight=w[prompt]) for w in resamples.weights]
    assert roc_auc(data, rewards, resamples).ci95 == pytest.approx(np.percentile(areas, [2.5, 97.5]), abs=1e-9)


@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SETS)
def test_pearson_within_prompts(sets: list[list[tuple[int, int]]]) -> None:
    prompt, rewards, score = flat(sets)
    found = prompt_pearson(scored(prompt, score), rewards, Resamples(len(sets), 0))
    each = [
        pearsonr([r for r, _ in rows], [s for _, s in rows]).statistic
        for rows in sets
        if len({r for r, _ in rows}) > 1 and len({s for _, s in rows}) > 1
    ]
    assert found.value == (pytest.approx(sum(each) / len(each)) if each else None)


def test_equal_numbers_with_rounding_define_no_correlation() -> None:
    rewards = np.array([0.1 + 0.2] * 3 + [1.0, 2.0, 3.0])
    found = prompt_pearson(scored([0, 0, 0, 1, 1, 1], [1.0, 2, 3, 1, 2, 3]), rewards, Resamples(2, 0))
    assert found.value == pytest.approx(1.0)


@pytest.mark.long
def test_intervals_cover_the_truth_where_a_prompts_pairs_agree() -> None:
    """Four pairs a prompt, which are right or wrong together: 60 prompts say as much as 60 pairs, not as 240."""
    rng, truth, inside, width = random.Random(0), 0.7, 0, []
    prompt = [number for number in range(60) for _ in range(4)]
    for trial in range(200):
        right = [float(rng.random() < truth) for _ in range(60)]
        data = pairs([5] * 240, [5] * 240, prompt)
        outcomes = np.array([right[number] for number in prompt])
        interval_of = agreement(data, outcomes, Resamples(60, trial), 0).accuracy.ci95
        assert interval_of is not None
        inside += interval_of[0] <= truth <= interval_of[1]
        width.append(interval_of[1] - interval_of[0])
    assert 0.90 <= inside / 200 <= 0.985
    assert np.mean(width) == pytest.approx(2 * 1.96 * math.sqrt(0.7 * 0.3 / 60), rel=0.1)


def test_equal_outcomes_count_prompts_and_not_pairs() -> None:
    data = pairs([5] * 240, [6] * 240, [number for number in range(60) for _ in range(4)])
    found = agreement(data, np.ones(240), Resamples(60, 0), 0)
    assert found.accuracy.ci95 == pytest.approx([60 / (60 + 1.959964**2), 1.0], abs=1e-6)


def test_resamples_draw_each_prompt_as_often_as_chance() -> None:
    resamples = Resamples(50, 7)
    assert resamples.weights.shape == (2000, 50)
    assert (resamples.weights.sum(axis=1) == 50).all()
    assert resamples.weights.mean() == 1.0
    assert resamples.weights.var() == pytest.approx(1 - 1 / 50, abs=0.02)
    assert (Resamples(50, 7).weights == resamples.weights).all()
    assert not (Resamples(50, 8).weights == resamples.weights).all()
    values = np.random.default_rng(0).normal(size=(50, 3))
    assert resamples.sums(values)[5] == pytest.approx(resamples.weights[5].astype(float) @ values)
    assert len(Resamples(100_000, 0).weights) == 200
    assert interval(np.array([np.nan, np.nan])) is None
    assert ratio(np.array([1.0, 2.0]), np.array([2.0, 0.0]))[0] == 0.5
