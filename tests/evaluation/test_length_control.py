"""Win rates of drawn verdicts: what the estimator finds, its symmetry, its intervals, and data that say little."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
from verdicts import BASELINE, drawn, swapped

from dice_py.errors import DataError
from dice_py.evaluation.winrate.comparisons import COMPARISONS, Comparisons
from dice_py.evaluation.winrate.length_control import ModelRates, estimate_win_rates, scaled_lengths
from dice_py.evaluation.winrate.summary import LEAST_MODELS, summarize


def by_model(comparisons: Comparisons, **options: Any) -> dict[str, ModelRates]:
    return {rates.model: rates for rates in estimate_win_rates(comparisons, **options).models}


def of_rows(*rows: tuple[str, str, float | None, int | None, int | None]) -> Comparisons:
    table = pl.DataFrame([(*row, *[None] * 5) for row in rows], schema=COMPARISONS, orient="row")
    return Comparisons(table, BASELINE, None)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_win_rate_at_equal_length_is_found(seed: int) -> None:
    comparisons, truth = drawn(models=12, prompts=400, seed=seed)
    rates = by_model(comparisons, resamples=0)
    controlled = [abs(rates[name].length_controlled_win_rate - truth[name]) for name in truth]
    raw = [abs(rates[name].win_rate - truth[name]) for name in truth]
    assert max(controlled) < 4
    assert np.mean(controlled) < np.mean(raw) / 3


@pytest.mark.parametrize("seed", [0, 1])
def test_the_raw_rate_is_the_mean_preference(seed: int) -> None:
    comparisons, _ = drawn(seed=seed)
    means = dict(comparisons.table.group_by("model").agg(100 * pl.col("preference").mean()).iter_rows())
    assert {name: rates.win_rate for name, rates in by_model(comparisons, resamples=0).items()} == pytest.approx(means)


@pytest.mark.parametrize(("seed", "models"), [(0, 8), (1, 5), (2, 2), (3, 1)])
def test_from_the_other_side_it_is_100_minus_the_rate(seed: int, models: int) -> None:
    comparisons, _ = drawn(models=models, seed=seed)
    ours = estimate_win_rates(comparisons, resamples=0)
    theirs = estimate_win_rates(swapped(comparisons), resamples=0)
    for one, other in zip(ours.models, theirs.models, strict=True):
        assert one.win_rate + other.win_rate == pytest.approx(100)
        assert one.length_controlled_win_rate + other.length_controlled_win_rate == pytest.approx(100, abs=1e-3)
    turned = replace(ours.difficulty, gamma={prompt: -value for prompt, value in ours.difficulty.gamma.items()})
    if models > 1:
        same = estimate_win_rates(comparisons, ours.difficulty, resamples=0)
        again = estimate_win_rates(swapped(comparisons), turned, resamples=0)
        for first, one, other in zip(ours.models, same.models, again.models, strict=True):
            assert one.length_controlled_win_rate == pytest.approx(first.length_controlled_win_rate, abs=1e-3)
            assert one.length_controlled_win_rate + other.length_controlled_win_rate == pytest.approx(100, abs=1e-3)


def test_a_model_that_ties_with_the_baseline_has_50() -> None:
    comparisons, _ = drawn()
    tied = comparisons.table.filter(pl.col("model") == "model-0").with_columns(
        model=pl.lit("twin"), preference=0.5, length="baseline_length"
    )
    rates = by_model(replace(comparisons, table=pl.concat([comparisons.table, tied])), resamples=50)["twin"]
    assert rates.win_rate == 50
    assert rates.win_rate_ci95 == (50, 50)
    # Though the other models would have it follow the prompts' difficulty.
    assert rates.length_controlled_win_rate == pytest.approx(50, abs=0.1)
    assert rates.length_controlled_win_rate_ci95 == pytest.approx((50, 50), abs=0.1)


def test_lengths_are_scaled_by_the_sample_deviation_of_each_model() -> None:
    delta = np.array([[100.0, -50.0, 400.0, 999.0], [7.0, 7.0, 7.0, 7.0], [0.0, 0.0, 0.0, 0.0]])
    weight = np.array([[1.0, 1.0, 1.0, 0.0], [1.0] * 4, [0.0] * 4])
    scaled = scaled_lengths(delta, weight)
    assert scaled[0, :3] == pytest.approx(np.tanh(delta[0, :3] / np.std(delta[0, :3], ddof=1)))
    assert not scaled[1:].any()


@pytest.mark.parametrize("given", [False, True])
def test_intervals_are_of_the_seed_and_around_the_rate(given: bool) -> None:
    comparisons, _ = drawn(prompts=80)
    difficulty = estimate_win_rates(comparisons, resamples=0).difficulty if given else None
    once = by_model(comparisons, difficulty=difficulty, resamples=60, seed=5)
    again = by_model(comparisons, difficulty=difficulty, resamples=60, seed=5)
    other = by_model(comparisons, difficulty=difficulty, resamples=60, seed=6)
    assert once == again
    for name, rates in once.items():
        low, high = rates.length_controlled_win_rate_ci95
        assert low < rates.length_controlled_win_rate < high
        assert rates.length_controlled_win_rate_ci95 != other[name].length_controlled_win_rate_ci95


def test_the_raw_interval_is_the_percentile_bootstrap_over_prompts() -> None:
    comparisons, _ = drawn(models=3, prompts=40)
    rates = by_model(comparisons, resamples=200, seed=3)
    rng = np.random.default_rng(3)
    draws = [rng.integers(0, 40, 40) for _ in range(200)]
    for name in rates:
        values = comparisons.table.filter(pl.col("model") == name).sort("prompt")["preference"].to_numpy()
        expected = np.percentile([100 * values[draw].mean() for draw in draws], [2.5, 97.5])
        assert rates[name].win_rate_ci95 == pytest.approx(tuple(expected))


def test_the_order_of_rows_changes_nothing() -> None:
    comparisons, _ = drawn(models=5, prompts=30)
    shuffled = replace(comparisons, table=comparisons.table.sample(fraction=1.0, shuffle=True, seed=1))
    once, again = (by_model(table, resamples=20) for table in (comparisons, shuffled))
    for name, rates in once.items():
        assert rates.length_controlled_win_rate_ci95 == pytest.approx(again[name].length_controlled_win_rate_ci95)
        assert rates.win_rate == pytest.approx(again[name].win_rate)


@pytest.mark.slow
def test_intervals_cover_the_truth() -> None:
    inside = total = 0
    for seed in range(12):
        comparisons, truth = drawn(models=10, prompts=150, seed=100 + seed)
        for name, rates in by_model(comparisons, resamples=150).items():
            low, high = rates.length_controlled_win_rate_ci95
            inside += low - 0.5 <= truth[name] <= high + 0.5
            total += 1
    assert inside / total > 0.85


def test_a_given_difficulty_stands_for_the_models_that_it_is_from() -> None:
    comparisons, truth = drawn(models=20, prompts=400, seed=4)
    first = replace(comparisons, table=comparisons.table.filter(pl.col("model") != "model-7"))
    last = replace(comparisons, table=comparisons.table.filter(pl.col("model") == "model-7"))
    fitted = estimate_win_rates(first, resamples=0).difficulty
    assert "model-7" not in fitted.models
    alone = estimate_win_rates(last, fitted, resamples=0)
    assert alone.difficulty is fitted
    assert alone.models[0].length_controlled_win_rate == pytest.approx(truth["model-7"], abs=4)


def test_prompts_without_a_difficulty_are_left_out_and_counted() -> None:
    comparisons, _ = drawn(models=6, prompts=50)
    fitted = estimate_win_rates(comparisons, resamples=0).difficulty
    known = {prompt: value for prompt, value in fitted.gamma.items() if prompt != "prompt 3"}
    rates = estimate_win_rates(comparisons, replace(fitted, gamma=known), resamples=0)
    assert {model.controlled_prompts for model in rates.models} == {49}
    assert {model.prompts for model in rates.models} == {50}
    notes = summarize(comparisons, rates, fitted)["notes"]
    assert "6 rows are left out of the length-controlled win rates" in notes[0]
    without = replace(comparisons, table=comparisons.table.filter(pl.col("prompt") != "prompt 3"))
    alone = estimate_win_rates(without, replace(fitted, gamma=known), resamples=0)
    for one, other in zip(rates.models, alone.models, strict=True):
        assert one.length_controlled_win_rate == pytest.approx(other.length_controlled_win_rate, abs=1e-4)
    with pytest.raises(DataError, match="none of the 50 prompts is in it"):
        estimate_win_rates(comparisons, replace(fitted, gamma={"another": 0.1}), resamples=0)


def test_rows_without_a_verdict_or_a_length_do_not_count() -> None:
    comparisons, _ = drawn(models=6, prompts=60)
    is_first = (pl.col("model") == "model-0") & (pl.col("prompt") == "prompt 1")
    is_second = (pl.col("model") == "model-0") & (pl.col("prompt") == "prompt 2")
    table = comparisons.table.with_columns(
        preference=pl.when(~is_first).then("preference"), length=pl.when(~is_second).then("length")
    )
    rates = by_model(replace(comparisons, table=table), resamples=0)
    assert (rates["model-0"].prompts, rates["model-0"].no_verdict, rates["model-0"].controlled_prompts) == (59, 1, 58)
    dropped = by_model(replace(comparisons, table=comparisons.table.filter(~is_first & ~is_second)), resamples=0)
    for name, one in rates.items():
        assert one.length_controlled_win_rate == pytest.approx(dropped[name].length_controlled_win_rate, abs=1e-4)


def test_missing_prompts_of_a_model_change_little_for_the_others() -> None:
    comparisons, truth = drawn(models=12, prompts=300, seed=2)
    few = pl.col("prompt").is_in([f"prompt {at}" for at in range(150)])
    table = comparisons.table.filter((pl.col("model") != "model-1") | few)
    rates = by_model(replace(comparisons, table=table), resamples=0)
    assert rates["model-1"].prompts == 150
    for name in truth:
        assert rates[name].length_controlled_win_rate == pytest.approx(truth[name], abs=9 if name == "model-1" else 4)


def test_models_that_always_win_or_lose() -> None:
    comparisons, _ = drawn(models=6, prompts=60)
    table = comparisons.table.with_columns(
        preference=pl.when(pl.col("model") == "model-0")
        .then(1.0)
        .when(pl.col("model") == "model-1")
        .then(0.0)
        .otherwise(pl.col("preference").round())
    )
    rates = by_model(replace(comparisons, table=table), resamples=40)
    assert (rates["model-0"].win_rate, rates["model-1"].win_rate) == (100, 0)
    assert rates["model-0"].length_controlled_win_rate > 98
    assert rates["model-1"].length_controlled_win_rate < 2
    for model in rates.values():
        assert all(np.isfinite(model.length_controlled_win_rate_ci95))
        assert 0 <= model.length_controlled_win_rate_ci95[0] <= model.length_controlled_win_rate_ci95[1] <= 100


@pytest.mark.parametrize("gap", [0, 250])
def test_constant_length_differences_are_told_of(gap: int) -> None:
    comparisons, _ = drawn(models=5, prompts=40)
    table = comparisons.table.with_columns(length=pl.col("baseline_length") + gap)
    constant = replace(comparisons, table=table)
    rates = estimate_win_rates(constant, resamples=0)
    for model in rates.models:
        assert model.length_coefficient is None
        assert model.length_controlled_win_rate == pytest.approx(model.win_rate, abs=3)
    assert any(
        "nothing can be said of the effect of length" in note for note in summarize(constant, rates, None)["notes"]
    )


def test_one_prompt_has_rates_and_no_intervals() -> None:
    rates = estimate_win_rates(of_rows(("p", "a", 0.75, 10, 20), ("p", "b", 0.25, 30, 20)), resamples=10)
    assert [model.win_rate for model in rates.models] == [75, 25]
    assert [model.win_rate_ci95 for model in rates.models] == [None, None]
    assert all(0 <= model.length_controlled_win_rate <= 100 for model in rates.models)


def test_without_lengths_there_is_the_raw_rate_alone() -> None:
    comparisons = of_rows(("p", "a", 1.0, None, 5), ("q", "a", 0.0, 3, None), ("p", "b", 0.5, None, None))
    rates = estimate_win_rates(comparisons, resamples=10)
    assert rates.difficulty is None
    assert [model.length_controlled_win_rate for model in rates.models] == [None, None]
    assert rates.models[0].win_rate == 50
    summary = summarize(comparisons, rates, None)
    assert summary["comparable"] is False
    assert "no length-controlled win rate of a, b" in summary["notes"][0]


def test_no_verdict_at_all() -> None:
    with pytest.raises(DataError, match="no row has a verdict"):
        estimate_win_rates(of_rows(("p", "a", None, 1, 1)))


def test_a_model_whose_prompts_a_resample_misses() -> None:
    comparisons, _ = drawn(models=6, prompts=30)
    lone = of_rows(("prompt 0", "lone", 1.0, 10, 2000)).table
    rates = by_model(replace(comparisons, table=pl.concat([comparisons.table, lone])), resamples=60)["lone"]
    assert rates.win_rate_ci95 == (100, 100)
    assert rates.length_controlled_win_rate_ci95 is not None


@pytest.mark.parametrize("models", [1, 2, LEAST_MODELS - 1, LEAST_MODELS])
def test_few_models_are_not_comparable(models: int) -> None:
    comparisons, _ = drawn(models=models)
    rates = estimate_win_rates(comparisons, resamples=0)
    summary = summarize(comparisons, rates, None)
    assert summary["comparable"] is (models >= LEAST_MODELS)
    assert any("not comparable" in note for note in summary["notes"]) is (models < LEAST_MODELS)
    fitted = estimate_win_rates(drawn(models=9)[0], resamples=0).difficulty
    given = summarize(comparisons, estimate_win_rates(comparisons, fitted, resamples=0), fitted)
    assert given["comparable"] is True
    other = replace(fitted, baseline="another")
    assert summarize(comparisons, rates, other)["comparable"] is False


def test_models_are_listed_best_first_with_the_baseline_at_50() -> None:
    comparisons, _ = drawn(models=6)
    models = summarize(comparisons, estimate_win_rates(comparisons, resamples=0), None)["models"]
    rates = [model["length_controlled_win_rate"] for model in models]
    assert rates == sorted(rates, reverse=True)
    itself = next(model for model in models if model["model"] == BASELINE)
    assert itself["baseline"] is True
    assert itself["win_rate"] == itself["length_controlled_win_rate"] == 50
