"""The two logistic regressions of length-controlled win rates, and how models borrow strength from one another.

Model m's response to prompt x beats the baseline's with probability P, where

    logit P = φ_m·tanh(Δlen/sd_m) + ψ_m·γ_x + θ_m

(AlpacaEval 2, arXiv 2404.04475, equation 3). `fit_joint` fits γ together with φ and θ of all models, with ψ = 1;
`fit_each` fits φ, ψ and θ of each model with γ fixed; `pooled_prior` says how φ and ψ vary over the models.

The fits are by Newton's method with the steps written out. SciPy's and scikit-learn's solvers reach the same optimum
(tests/evaluation/test_winrate_logistic.py), but take some hundred times as long for the joint fit, which is repeated
in every resample of the bootstrap, and have no prior with a mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

WEAK = 1e-3
"""Precision of coefficients without a prior of their own: it only keeps them finite where a model always wins."""

_LEAST_VARIANCE = 1e-4
_LEAST_DISPERSION = 1e-3
_STEPS, _HALVINGS = 100, 40
_ROUNDING = 1e-12
"""Of an objective, relative: a step at the optimum may seem that much worse."""


@dataclass(frozen=True)
class Cells:
    """The comparisons of M models on P prompts.

    Attributes:
        preference: (M, P), 0 to 1; anything finite where there is no comparison.
        length: (M, P), tanh(Δlen/sd).
        weight: (M, P), 1.0 where there is a comparison, else 0.0.
    """

    preference: Array
    length: Array
    weight: Array

    def has_data(self, prompt_weight: Array | None = None) -> NDArray[np.bool_]:
        """(M,): which models have a comparison on a prompt that counts."""
        weight = self.weight if prompt_weight is None else self.weight * prompt_weight
        counts: NDArray[np.bool_] = weight.sum(1) > 0
        return counts


@dataclass(frozen=True)
class Prior:
    """Normal priors of the coefficients of length (φ) and difficulty (ψ) over models. Infinite variance: none."""

    length_mean: float = 0.0
    length_variance: float = float("inf")
    difficulty_mean: float = 1.0
    difficulty_variance: float = float("inf")


@dataclass(frozen=True)
class JointFit:
    """`coefficients`: (M, 2), φ and θ; `difficulty`: (P,), γ; `freedom`: how many parameters γ amounts to."""

    coefficients: Array
    difficulty: Array
    freedom: float


@dataclass(frozen=True)
class EachFit:
    """`coefficients`: (M, 3), φ, ψ and θ; `variance`: (M, 3), of each: the dispersion times the inverse Hessian."""

    coefficients: Array
    variance: Array


def fit_joint(
    cells: Cells, prompt_weight: Array, ridge: float, start: JointFit | None = None, tolerance: float = 1e-8
) -> JointFit:
    """Fits φ, θ of all models and γ of all prompts, with ψ = 1: cross-entropy + ridge/2·Σ γ².

    Args:
        prompt_weight: (P,), how often a prompt counts (with its part of the ridge); 1 without resampling.
        ridge: above 0.
        start: where to begin.
        tolerance: the fit ends when a step improves the objective by less.
    """
    import numpy as np
    from scipy.special import expit

    models, prompts = cells.preference.shape
    weight = cells.weight * prompt_weight
    at = np.arange(models)

    def logits(coefficients: Array, difficulty: Array) -> Array:
        return coefficients[:, :1] * cells.length + coefficients[:, 1:] + difficulty

    def objective(coefficients: Array, difficulty: Array) -> float:
        penalty = ridge * (prompt_weight @ difficulty**2) + WEAK * (coefficients**2).sum()
        z = logits(coefficients, difficulty)
        return float((weight * (np.logaddexp(0.0, z) - cells.preference * z)).sum() + penalty / 2)

    coefficients, difficulty = np.zeros((models, 2)), np.zeros(prompts)
    if start is not None:
        coefficients, difficulty = start.coefficients, start.difficulty
    value = objective(coefficients, difficulty)
    for _ in range(_STEPS):
        chance = expit(logits(coefficients, difficulty))
        residual = weight * (chance - cells.preference)
        curvature = weight * chance * (1 - chance)
        cross = np.concatenate([curvature * cells.length, curvature])  # (2M, P): all φ, then all θ
        gradient = np.concatenate([(residual * cells.length).sum(1), residual.sum(1)]) + WEAK * coefficients.T.ravel()
        of_difficulty = residual.sum(0) + ridge * prompt_weight * difficulty
        # A prompt that a resample leaves out has neither data nor ridge; its γ stays where it is.
        diagonal = np.where(prompt_weight > 0, curvature.sum(0) + ridge * prompt_weight, 1.0)
        block = np.zeros((2 * models, 2 * models))
        block[at, at] = (cross[:models] * cells.length).sum(1) + WEAK
        block[at + models, at + models] = curvature.sum(1) + WEAK
        block[at, at + models] = block[at + models, at] = cross[:models].sum(1)
        # γ is eliminated first: its part of the Hessian is diagonal (Schur complement).
        step = np.linalg.solve(block - (cross / diagonal) @ cross.T, gradient - cross @ (of_difficulty / diagonal))
        of_difficulty = (of_difficulty - cross.T @ step) / diagonal
        step = step.reshape(2, models).T
        size = 1.0
        for _ in range(_HALVINGS):
            new = (coefficients - size * step, difficulty - size * of_difficulty)
            new_value = objective(*new)
            if new_value <= value + _ROUNDING * (1 + abs(value)):
                break
            size /= 2
        else:
            break  # as near as rounding allows
        gain, value = value - new_value, new_value
        coefficients, difficulty = new
        if gain < tolerance:
            break
    chance = expit(logits(coefficients, difficulty))
    curvature = (weight * chance * (1 - chance)).sum(0)
    freedom = (curvature / (curvature + ridge * np.where(prompt_weight > 0, prompt_weight, 1.0))).sum()
    return JointFit(coefficients, difficulty, float(freedom))


def fit_each(
    cells: Cells,
    prompt_weight: Array,
    difficulty: Array,
    prior: Prior,
    dispersion: float = 1.0,
    start: EachFit | None = None,
    tolerance: float = 1e-8,
) -> EachFit:
    """Fits φ, ψ and θ of every model by itself, with γ fixed.

    The objective is cross-entropy/dispersion + Σ (coefficient − prior mean)²/(2·prior variance).

    Args:
        prompt_weight, start, tolerance: as of `fit_joint`.
        difficulty: (P,), γ.
        dispersion: of the preferences (`dispersion_of`).
    """
    import numpy as np
    from scipy.special import expit

    weight = cells.weight * prompt_weight
    mean = np.array([prior.length_mean, prior.difficulty_mean, 0.0])
    precision = np.maximum([dispersion / prior.length_variance, dispersion / prior.difficulty_variance, 0.0], WEAK)
    features = (cells.length, np.broadcast_to(difficulty, weight.shape), np.ones_like(weight))

    def logits(coefficients: Array) -> Array:
        return coefficients[:, :1] * cells.length + coefficients[:, 1:2] * difficulty + coefficients[:, 2:]

    def objective(coefficients: Array) -> Array:
        z = logits(coefficients)
        entropy = (weight * (np.logaddexp(0.0, z) - cells.preference * z)).sum(1)
        return np.asarray(entropy + ((coefficients - mean) ** 2 @ precision) / 2)

    coefficients = np.tile(mean, (len(weight), 1)) if start is None else start.coefficients
    value = objective(coefficients)
    for _ in range(_STEPS):
        chance = expit(logits(coefficients))
        residual = weight * (chance - cells.preference)
        curvature = weight * chance * (1 - chance)
        gradient = np.stack([(residual * one).sum(1) for one in features], 1) + precision * (coefficients - mean)
        hessian = np.empty((len(weight), 3, 3))
        for i in range(3):
            for j in range(i, 3):
                hessian[:, i, j] = hessian[:, j, i] = (curvature * features[i] * features[j]).sum(1)
        hessian += np.diag(precision)
        step = np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
        size = np.ones((len(weight), 1))
        for _ in range(_HALVINGS):
            new = coefficients - size * step
            new_value = objective(new)
            worse = new_value > value + _ROUNDING * (1 + abs(value))
            if not worse.any():
                break
            size[worse] /= 2
        gain = float((value - new_value)[~worse].max(initial=0.0))
        coefficients = np.where(worse[:, None], coefficients, new)
        value = np.where(worse, value, new_value)
        if gain < tolerance:
            break
    variance = dispersion * np.diagonal(np.linalg.inv(hessian), axis1=1, axis2=2)
    return EachFit(coefficients, variance)


def dispersion_of(cells: Cells, prompt_weight: Array, each: EachFit, difficulty: Array, freedom: float) -> float:
    """Variance of the preferences around the fit, relative to that of wins and losses: Σ(y−P)² / ΣP(1−P).

    About 1 for preferences of 0 and 1, and less where the judge gives probabilities, which carry more than a win or a
    loss does. Corrected for the parameters of the fit; at least 0.001.

    Args:
        each, difficulty: the fit.
        freedom: of γ (`JointFit`).
    """
    from scipy.special import expit

    weight = cells.weight * prompt_weight
    phi, psi, theta = (each.coefficients[:, at : at + 1] for at in range(3))
    chance = expit(phi * cells.length + psi * difficulty + theta)
    expected = float((weight * chance * (1 - chance)).sum())
    left = float(weight.sum()) - 3 * int(cells.has_data(prompt_weight).sum()) - freedom
    if expected == 0 or left <= 0:
        return 1.0
    ratio = float((weight * (cells.preference - chance) ** 2).sum()) / expected * float(weight.sum()) / left
    return max(ratio, _LEAST_DISPERSION)


def pooled_prior(each: EachFit, has_data: NDArray[np.bool_]) -> Prior:
    """The mean of φ and ψ over models and their variance between models, from fits without a prior.

    A model whose lengths hardly vary, or that is always shorter than the baseline, says little about its own φ; with
    the prior, the other models say the rest (empirical Bayes). Below two models there is no prior.

    Args:
        has_data: (M,), the models that count.
    """
    if has_data.sum() < 2:
        return Prior()
    length = _moments(each.coefficients[has_data, 0], each.variance[has_data, 0])
    difficulty = _moments(each.coefficients[has_data, 1], each.variance[has_data, 1])
    return Prior(*length, *difficulty)


def _moments(values: Array, variance: Array) -> tuple[float, float]:
    """Mean and variance between groups (DerSimonian and Laird 1986, Controlled Clinical Trials 7, 177-188)."""
    trust = 1 / variance
    mean = (trust @ values) / trust.sum()
    excess = trust @ (values - mean) ** 2 - (len(values) - 1)
    between = max(float(excess / (trust.sum() - (trust**2).sum() / trust.sum())), _LEAST_VARIANCE)
    trust = 1 / (variance + between)
    return float((trust @ values) / trust.sum()), between


def chance_at_equal_length(coefficients: Array, difficulty: Array) -> Array:
    """(M, P): the probability that each model's response beats the baseline's, at Δlen = 0."""
    from scipy.special import expit

    chance: Array = expit(coefficients[:, 1:2] * difficulty + coefficients[:, 2:])
    return chance
