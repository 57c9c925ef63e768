"""Win rates, plain and length-controlled, of models against a baseline: the estimator and its intervals.

The length-controlled win rate is AlpacaEval 2's (arXiv 2404.04475): the mean over prompts of the probability that the
model's response beats the baseline's if both were equally long,

    logit P = φ_m·tanh(Δlen/sd_m) + ψ_m·γ_x + θ_m,   at Δlen = 0,

where Δlen is the model's length minus the baseline's in characters, and sd_m its standard deviation over prompts. Two
things are as AlpacaEval does them but from other data, since its own fits use files of its authors. γ_x comes from a
joint fit of the models at hand, or from an earlier one (difficulty.py). AlpacaEval pulls φ and ψ of every model toward
those of two rewritten versions of the baseline; here they are pulled toward their means over the models, as far as the
models agree and their verdicts leave open (`pooled_prior`, `dispersion_of`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import polars as pl

from dice_py.errors import DataError
from dice_py.evaluation.winrate.comparisons import Comparisons
from dice_py.evaluation.winrate.difficulty import Difficulty
from dice_py.evaluation.winrate.logistic import (
    Cells,
    EachFit,
    JointFit,
    Prior,
    chance_at_equal_length,
    dispersion_of,
    fit_each,
    fit_joint,
    pooled_prior,
)
from dice_py.events import Report, no_report

if TYPE_CHECKING:
    import numpy as np

    from dice_py.evaluation.winrate.logistic import Array

RIDGE = 0.2
"""On γ. Of 0.02, 0.05, 0.1, 0.2, 0.5 and 1 it predicts left-out verdicts best (docs/winrate.md)."""

_BOOTSTRAP_TOLERANCE = 1e-3
"""Of the objective, in nats over all comparisons; it moves a win rate by less than 0.01 points."""


@dataclass(frozen=True)
class ModelRates:
    """The figures of one model; rates in percent, lengths in characters. None where a figure cannot be had.

    Attributes:
        prompts: with a verdict.
        no_verdict: prompts without one.
        controlled_prompts: of `prompts`, those of the length-controlled figure: both lengths and γ are known.
        length_coefficient, difficulty_coefficient, intercept: φ, ψ and θ. φ is None where all length differences are
            the same.
    """

    model: str
    win_rate: float | None
    win_rate_ci95: tuple[float, float] | None
    length_controlled_win_rate: float | None
    length_controlled_win_rate_ci95: tuple[float, float] | None
    prompts: int
    no_verdict: int
    controlled_prompts: int
    mean_length: float | None
    length_coefficient: float | None = None
    difficulty_coefficient: float | None = None
    intercept: float | None = None


@dataclass(frozen=True)
class WinRates:
    """`models` in the order of their names, and the difficulty that was fitted or given (None: no lengths at all)."""

    models: list[ModelRates]
    difficulty: Difficulty | None


@dataclass(frozen=True)
class Design:
    """The comparisons as (M, P) arrays, in the order of `models` and `prompts`.

    `judged` is 1.0 where there is a verdict, `cells.weight` where there are both lengths, and a known γ, too.
    """

    models: list[str]
    prompts: list[str]
    judged: Array
    cells: Cells


@dataclass(frozen=True)
class _Fit:
    joint: JointFit
    free: EachFit | None
    each: EachFit
    prior: Prior
    dispersion: float


def estimate_win_rates(
    comparisons: Comparisons,
    difficulty: Difficulty | None = None,
    *,
    resamples: int = 500,
    seed: int = 0,
    ridge: float = RIDGE,
    report: Report = no_report,
) -> WinRates:
    """The win rates of all models, with 95 % intervals by a bootstrap over prompts.

    In a resample everything is fitted again: γ, the prior, the dispersion, and each model. With a given difficulty,
    only the models are. sd_m is that of all prompts.

    Args:
        difficulty: γ of an earlier fit; None fits it from these models.
        resamples: 0 makes no intervals.
        seed: of the bootstrap; all models share its prompts.
        ridge: on γ.
        report: receives `progress` of the resamples.

    Raises:
        DataError: no row has a verdict, or none of the prompts is in `difficulty`.
    """
    import numpy as np
    from threadpoolctl import threadpool_limits

    design = build_design(comparisons, difficulty)
    gamma = None
    if difficulty is not None:
        gamma = np.array([difficulty.gamma.get(prompt, 0.0) for prompt in design.prompts])
    once = np.ones(len(design.prompts))
    # The matrices are small: threads that wait for one another cost ten times what they save on a busy machine.
    with threadpool_limits(1):
        fit = _fit(design, once, ridge, difficulty, gamma) if design.cells.weight.any() else None
        intervals = _intervals(design, fit, ridge, difficulty, gamma, resamples, seed, report)
    raw, controlled = _rates(design, once, fit)
    rates = [_model_rates(comparisons, design, at, raw, controlled, intervals, fit) for at in range(len(design.models))]
    if difficulty is None and fit is not None:
        values = fit.joint.difficulty.tolist()
        used = design.cells.weight.sum(0) > 0
        difficulty = Difficulty(
            {prompt: value for prompt, value, is_used in zip(design.prompts, values, used, strict=True) if is_used},
            fit.prior,
            fit.dispersion,
            comparisons.baseline,
            tuple(name for name, has in zip(design.models, design.cells.has_data(), strict=True) if has),
            ridge,
        )
    return WinRates(rates, difficulty)


def build_design(comparisons: Comparisons, difficulty: Difficulty | None = None) -> Design:
    """The comparisons as arrays.

    Raises:
        DataError: no row has a verdict, or none of the prompts is in `difficulty`.
    """
    import numpy as np

    table, models = comparisons.table, comparisons.models
    if table["preference"].null_count() == len(table):
        raise DataError("no row has a verdict: every preference is null")
    prompts = table["prompt"].unique().sort().to_list()
    row_of, column_of = ({name: at for at, name in enumerate(names)} for names in (models, prompts))
    row = np.array([row_of[name] for name in table["model"]])
    column = np.array([column_of[name] for name in table["prompt"]])

    def array(values: pl.Series) -> Array:
        filled = np.zeros((len(models), len(prompts)))
        filled[row, column] = values.cast(pl.Float64).fill_null(0.0).to_numpy()
        return filled

    has_verdict = table["preference"].is_not_null()
    has_lengths = table["length"].is_not_null() & table["baseline_length"].is_not_null()
    weight = array(has_verdict & has_lengths)
    if difficulty is not None:
        known = np.array([float(prompt in difficulty.gamma) for prompt in prompts])
        if not known.any():
            raise DataError(
                f"--difficulty: none of the {len(prompts):,} prompts is in it; its prompts are named like "
                f"{next(iter(difficulty.gamma))!r:.80}, and those of the file like {prompts[0]!r:.80} (--prompt-column)"
            )
        weight = weight * known
    length = scaled_lengths(array(table["length"] - table["baseline_length"]), weight)
    cells = Cells(array(table["preference"]), length, weight)
    return Design(models, prompts, array(has_verdict), cells)


def scaled_lengths(delta: Array, weight: Array) -> Array:
    """tanh(Δlen/sd), (M, P), with the sample standard deviation of each row; 0 where all differences are the same.

    Args:
        delta: (M, P), characters.
        weight: (M, P), 1.0 where there is a comparison.
    """
    import numpy as np

    count = weight.sum(1, keepdims=True)
    mean = (weight * delta).sum(1, keepdims=True) / np.maximum(count, 1)
    squares = (weight * (delta - mean) ** 2).sum(1, keepdims=True)
    deviation = np.sqrt(squares / np.maximum(count - 1, 1))
    scaled: Array = np.tanh(np.divide(delta, deviation, out=np.zeros_like(delta), where=deviation > 0))
    return scaled


def _fit(
    design: Design,
    prompt_weight: Array,
    ridge: float,
    difficulty: Difficulty | None,
    gamma: Array | None,
    start: _Fit | None = None,
    tolerance: float = 1e-8,
) -> _Fit:
    import numpy as np

    cells = design.cells
    if difficulty is not None and gamma is not None:
        begin = None if start is None else start.each
        known = JointFit(np.zeros((len(design.models), 2)), gamma, 0.0)
        spread, prior = difficulty.dispersion, difficulty.prior
        each = fit_each(cells, prompt_weight, gamma, prior, spread, begin, tolerance)
        return _Fit(known, None, each, prior, spread)
    joint = fit_joint(cells, prompt_weight, ridge, None if start is None else start.joint, tolerance)
    begin = None if start is None else start.free
    free = fit_each(cells, prompt_weight, joint.difficulty, Prior(), start=begin, tolerance=tolerance)
    spread = dispersion_of(cells, prompt_weight, free, joint.difficulty, joint.freedom)
    prior = pooled_prior(replace(free, variance=spread * free.variance), cells.has_data(prompt_weight))
    each = fit_each(cells, prompt_weight, joint.difficulty, prior, spread, free, tolerance)
    return _Fit(joint, free, each, prior, spread)


def _rates(design: Design, prompt_weight: Array, fit: _Fit | None) -> tuple[Array, Array]:
    """The plain and the length-controlled win rate of each model, in percent; NaN where it has no prompt."""
    import numpy as np

    def mean(weight: Array, values: Array) -> Array:
        total = weight.sum(1)
        rate: Array = np.divide(100 * (weight * values).sum(1), total, out=np.full(len(total), np.nan), where=total > 0)
        return rate

    raw = mean(design.judged * prompt_weight, design.cells.preference)
    if fit is None:
        return raw, np.full(len(raw), np.nan)
    chance = chance_at_equal_length(fit.each.coefficients, fit.joint.difficulty)
    return raw, mean(design.cells.weight * prompt_weight, chance)


def _intervals(
    design: Design,
    fit: _Fit | None,
    ridge: float,
    difficulty: Difficulty | None,
    gamma: Array | None,
    resamples: int,
    seed: int,
    report: Report,
) -> np.ndarray | None:
    """(2, M, 2): low and high of both rates of each model; None without resamples, or with a single prompt."""
    import numpy as np

    prompts = len(design.prompts)
    if resamples == 0 or prompts < 2:
        return None
    rng = np.random.default_rng(seed)
    draws = np.empty((resamples, 2, len(design.models)))
    for at in range(resamples):
        counts = np.bincount(rng.integers(0, prompts, prompts), minlength=prompts).astype(np.float64)
        again = None
        if fit is not None:
            again = _fit(design, counts, ridge, difficulty, gamma, fit, _BOOTSTRAP_TOLERANCE)
        draws[at] = _rates(design, counts, again)
        report("progress", stage="winrate", done=at + 1, total=resamples, unit="resamples")
    # A model with few prompts may have none of them in a resample.
    never = np.isnan(draws).all(0)
    draws[:, never] = 0.0
    low, high = np.nanpercentile(draws, [2.5, 97.5], axis=0)
    interval = np.stack([low, high], -1)
    interval[never] = np.nan
    return interval


def _model_rates(
    comparisons: Comparisons,
    design: Design,
    at: int,
    raw: Array,
    controlled: Array,
    intervals: np.ndarray | None,
    fit: _Fit | None,
) -> ModelRates:
    rows = comparisons.table.filter(pl.col("model") == design.models[at])
    length = rows["length"].mean()
    is_controlled = fit is not None and bool(design.cells.weight[at].any())
    coefficients = fit.each.coefficients[at].tolist() if fit is not None and is_controlled else [None] * 3

    def rate(values: Array) -> float | None:
        value = float(values[at])
        return value if value == value else None

    def interval(which: int) -> tuple[float, float] | None:
        if intervals is None or intervals[which, at, 0] != intervals[which, at, 0]:
            return None
        return float(intervals[which, at, 0]), float(intervals[which, at, 1])

    return ModelRates(
        model=design.models[at],
        win_rate=rate(raw),
        win_rate_ci95=interval(0),
        length_controlled_win_rate=rate(controlled),
        length_controlled_win_rate_ci95=interval(1),
        prompts=int(design.judged[at].sum()),
        no_verdict=rows["preference"].null_count(),
        controlled_prompts=int(design.cells.weight[at].sum()),
        mean_length=length if isinstance(length, float) else None,
        length_coefficient=coefficients[0] if design.cells.length[at].any() else None,
        difficulty_coefficient=coefficients[1],
        intercept=coefficients[2],
    )
