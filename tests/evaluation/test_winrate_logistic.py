"""The regressions of length-controlled win rates against general solvers on the plainly written objective."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from dice_py.evaluation.winrate.logistic import (
    WEAK,
    Cells,
    EachFit,
    Prior,
    chance_at_equal_length,
    dispersion_of,
    fit_each,
    fit_joint,
    pooled_prior,
)

Array = NDArray[np.float64]
SEEDS = (0, 1, 2)


def cells(seed: int, models: int = 4, prompts: int = 15, missing: float = 0.2, hard: bool = False) -> Cells:
    rng = np.random.default_rng(seed)
    preference = rng.random((models, prompts))
    if hard:
        preference = np.round(preference)
    weight = (rng.random((models, prompts)) >= missing).astype(float)
    return Cells(preference, np.tanh(rng.normal(-0.5, 1.0, (models, prompts))), weight)


def entropy(cells: Cells, model: int, prompt: int, logit: float) -> float:
    return math.log1p(math.exp(-abs(logit))) + max(logit, 0.0) - cells.preference[model, prompt] * logit


def joint_objective(flat: Array, cells: Cells, prompt_weight: Array, ridge: float) -> float:
    """Written as the equation is, cell by cell."""
    models, prompts = cells.weight.shape
    phi, theta, gamma = flat[:models], flat[models : 2 * models], flat[2 * models :]
    total = WEAK / 2 * float((flat[: 2 * models] ** 2).sum())
    for x in range(prompts):
        total += prompt_weight[x] * ridge / 2 * gamma[x] ** 2
        for m in range(models):
            if cells.weight[m, x]:
                logit = phi[m] * cells.length[m, x] + gamma[x] + theta[m]
                total += prompt_weight[x] * entropy(cells, m, x, logit)
    return total


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("hard", [False, True])
def test_the_joint_fit_is_the_optimum(seed: int, hard: bool) -> None:
    table = cells(seed, hard=hard)
    weight = np.random.default_rng(seed).integers(1, 3, table.weight.shape[1]).astype(float)
    fit = fit_joint(table, weight, ridge=0.3, tolerance=1e-12)
    ours = np.concatenate([*fit.coefficients.T, fit.difficulty])
    found = minimize(
        joint_objective, np.zeros_like(ours), (table, weight, 0.3), method="L-BFGS-B", options={"maxfun": 10**6}
    )
    assert joint_objective(ours, table, weight, 0.3) <= found.fun + 1e-9
    assert np.abs(ours - found.x).max() < 0.02
    bumped = ours + 1e-3 * np.random.default_rng(seed + 9).normal(size=len(ours))
    assert joint_objective(bumped, table, weight, 0.3) > joint_objective(ours, table, weight, 0.3)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_model_by_itself_is_what_scikit_learn_fits(seed: int) -> None:
    table = cells(seed)
    gamma = np.random.default_rng(seed).normal(size=table.weight.shape[1])
    fit = fit_each(table, np.ones(len(gamma)), gamma, Prior(difficulty_mean=0.0), tolerance=1e-12)
    for model in range(len(table.weight)):
        used = table.weight[model] > 0
        features = np.stack([table.length[model], gamma, np.ones_like(gamma)], 1)[used]
        share = table.preference[model][used]
        # A preference of p is a win of weight p and a loss of weight 1 − p.
        peer = LogisticRegression(C=1 / WEAK, fit_intercept=False, tol=1e-10, max_iter=10_000)
        peer.fit(np.tile(features, (2, 1)), np.repeat([1, 0], used.sum()), np.concatenate([share, 1 - share]))
        assert fit.coefficients[model] == pytest.approx(peer.coef_[0], abs=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_prior_pulls_as_its_equation_says(seed: int) -> None:
    table = cells(seed)
    gamma = np.random.default_rng(seed).normal(size=table.weight.shape[1])
    prior = Prior(1.9, 0.25, 1.2, 0.02)
    fit = fit_each(table, np.ones(len(gamma)), gamma, prior, tolerance=1e-12)

    def objective(flat: Array, model: int) -> float:
        pull = (flat[0] - 1.9) ** 2 / 0.25 + (flat[1] - 1.2) ** 2 / 0.02 + WEAK * flat[2] ** 2
        logits = flat[0] * table.length[model] + flat[1] * gamma + flat[2]
        terms = [entropy(table, model, x, logits[x]) for x in range(len(gamma)) if table.weight[model, x]]
        return float(pull / 2 + sum(terms))

    for model in range(len(table.weight)):
        found = minimize(objective, np.zeros(3), (model,), options={"gtol": 1e-8})
        assert fit.coefficients[model] == pytest.approx(found.x, abs=1e-4)


def test_a_prompt_that_counts_twice_is_a_prompt_that_is_there_twice() -> None:
    table = cells(3)
    weight = np.array([2.0, *np.ones(13), 0.0])
    columns = np.array([0, *range(14)])
    repeated = Cells(table.preference[:, columns], table.length[:, columns], table.weight[:, columns])
    ours, theirs = (
        fit_joint(table, weight, 0.2, tolerance=1e-12),
        fit_joint(repeated, np.ones(15), 0.2, tolerance=1e-12),
    )
    assert ours.coefficients == pytest.approx(theirs.coefficients, abs=1e-6)
    assert ours.difficulty[columns] == pytest.approx(theirs.difficulty, abs=1e-6)
    gamma = ours.difficulty
    each = fit_each(table, weight, gamma, Prior(), tolerance=1e-12)
    again = fit_each(repeated, np.ones(15), gamma[columns], Prior(), tolerance=1e-12)
    assert each.coefficients == pytest.approx(again.coefficients, abs=1e-6)
    assert each.variance == pytest.approx(again.variance, rel=1e-5)


def test_a_start_changes_nothing_but_the_time() -> None:
    table, once = cells(5), np.ones(15)
    joint = fit_joint(table, once, 0.2, tolerance=1e-12)
    far = fit_joint(cells(6), once, 0.2)
    assert fit_joint(table, once, 0.2, far, tolerance=1e-12).difficulty == pytest.approx(joint.difficulty, abs=1e-6)
    each = fit_each(table, once, joint.difficulty, Prior(), tolerance=1e-12)
    begun = fit_each(table, once, joint.difficulty, Prior(), start=EachFit(each.coefficients + 3, each.variance))
    assert begun.coefficients == pytest.approx(each.coefficients, abs=1e-6)


def test_a_model_that_always_wins_has_finite_coefficients() -> None:
    table = cells(0, missing=0.0)
    table.preference[0], table.preference[1] = 1.0, 0.0
    joint = fit_joint(table, np.ones(15), 0.2)
    each = fit_each(table, np.ones(15), joint.difficulty, Prior())
    assert np.isfinite(joint.coefficients).all()
    assert np.isfinite(each.coefficients).all()
    chance = chance_at_equal_length(each.coefficients, joint.difficulty)
    assert chance[0].min() > 0.95
    assert chance[1].max() < 0.05
    # Such a model says nothing about the effect of length, and the prior of the others hardly hears it.
    others = pooled_prior(EachFit(each.coefficients[2:], each.variance[2:]), np.ones(2, bool))
    assert pooled_prior(each, np.ones(4, bool)).length_mean == pytest.approx(others.length_mean, abs=0.2)


def test_the_prior_is_the_moment_estimate_over_models() -> None:
    # Equal variances: the estimate between models is the sample variance less the variance within.
    values = np.array([[1.0, 0.8, 0.0], [2.0, 1.2, 0.0], [3.0, 1.0, 0.0]])
    each = EachFit(values, np.full((3, 3), 0.25))
    prior = pooled_prior(each, np.ones(3, bool))
    assert (prior.length_mean, prior.length_variance) == pytest.approx((2.0, 1.0 - 0.25))
    # Models that differ less than their errors let them: as good as one common coefficient.
    assert prior.difficulty_mean == pytest.approx(1.0)
    assert prior.difficulty_variance < 0.001
    # Models without data do not count; with fewer than two there is no prior.
    assert pooled_prior(each, np.array([True, True, False])).length_mean == pytest.approx(1.5)
    assert pooled_prior(each, np.array([True, False, False])) == Prior()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_prior_finds_how_models_differ(seed: int) -> None:
    rng = np.random.default_rng(seed)
    variance = rng.uniform(0.05, 0.3, 400)
    phi = 1.9 + rng.normal(0.0, 0.5, 400) + rng.normal(0.0, np.sqrt(variance))
    each = EachFit(np.stack([phi, np.ones(400), np.zeros(400)], 1), np.stack([variance] * 3, 1))
    prior = pooled_prior(each, np.ones(400, bool))
    assert prior.length_mean == pytest.approx(1.9, abs=0.1)
    assert prior.length_variance == pytest.approx(0.25, abs=0.06)


def test_equal_lengths_leave_difficulty_and_strength() -> None:
    coefficients = np.array([[5.0, 2.0, -1.0]])
    gamma = np.array([0.0, 0.5, 3.0])
    assert chance_at_equal_length(coefficients, gamma)[0] == pytest.approx(expit([-1.0, 0.0, 5.0]))


@pytest.mark.parametrize(("hard", "least", "most"), [(True, 0.85, 1.2), (False, 0.0, 0.03)])
def test_wins_and_losses_have_a_dispersion_of_one_and_probabilities_less(hard: bool, least: float, most: float) -> None:
    rng = np.random.default_rng(0)
    models, prompts = 8, 300
    gamma = rng.normal(size=prompts)
    length = np.tanh(rng.normal(-0.3, 1.0, (models, prompts)))
    chance = expit(1.8 * length + gamma + rng.normal(size=(models, 1)))
    preference = (rng.random(chance.shape) < chance).astype(float) if hard else chance
    table, once = Cells(preference, length, np.ones_like(chance)), np.ones(prompts)
    joint = fit_joint(table, once, 0.2)
    each = fit_each(table, once, joint.difficulty, Prior())
    assert least < dispersion_of(table, once, each, joint.difficulty, joint.freedom) < most
    assert 0 < fit_joint(table, once, 100.0).freedom < joint.freedom < fit_joint(table, once, 0.01).freedom < prompts


def test_the_dispersion_is_the_variance_of_the_coefficients() -> None:
    table, gamma = cells(0), np.zeros(15)
    one, half = (fit_each(table, np.ones(15), gamma, Prior(), dispersion) for dispersion in (1.0, 0.5))
    assert half.variance == pytest.approx(one.variance / 2, rel=1e-6)
    assert half.coefficients == pytest.approx(one.coefficients, abs=1e-6)
    # The more a verdict tells, the less a prior does.
    prior = Prior(9.0, 0.5, 1.0, 0.5)
    pulled, less = (fit_each(table, np.ones(15), gamma, prior, dispersion) for dispersion in (1.0, 0.1))
    assert (less.coefficients[:, 0] < pulled.coefficients[:, 0]).all()
