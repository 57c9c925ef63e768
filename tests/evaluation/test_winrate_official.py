"""Real data: AlpacaEval's own length-controlled figures, from the verdicts on 29 models.

The files are not part of the repository (their license is CC BY-NC 4.0); ../shared/README.md says what they are.
docs/winrate.md has the figures, and benches/winrate.py makes them.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from places import ROOT

from dice_py.evaluation.winrate.comparisons import Comparisons
from dice_py.evaluation.winrate.length_control import WinRates, estimate_win_rates
from dice_py.evaluation.winrate.reading import read_comparisons

DATA = ROOT.parent / "shared" / "data"
SCORED, FIGURES = DATA / "alpaca_eval_scored.parquet", DATA / "alpaca_official.json"

pytestmark = pytest.mark.skipif(
    not (SCORED.is_file() and FIGURES.is_file()),
    reason="the AlpacaEval data and its official figures are not beside the checkout (../shared)",
)


@pytest.fixture(scope="module")
def comparisons() -> Comparisons:
    return read_comparisons([SCORED], "gpt4_1106_preview")


@pytest.fixture(scope="module")
def official() -> dict[str, float]:
    return dict(json.loads(FIGURES.read_text())["length_controlled_winrate"])


@pytest.fixture(scope="module")
def fitted(comparisons: Comparisons) -> WinRates:
    return estimate_win_rates(comparisons, resamples=0)


def differences(rates: WinRates, official: dict[str, float], figure: str = "length_controlled_win_rate") -> np.ndarray:
    return np.array(
        [getattr(model, figure) - official[model.model] for model in rates.models if model.model in official]
    )


def test_official_figures_are_reached(fitted: WinRates, official: dict[str, float]) -> None:
    found = differences(fitted, official)
    assert len(found) == 16
    assert np.abs(found).mean() < 0.65
    assert np.abs(found).max() < 3
    assert np.abs(differences(fitted, official, "win_rate")).mean() > 4.5


def test_the_rest_of_what_is_known(comparisons: Comparisons, fitted: WinRates) -> None:
    assert len(fitted.models) == 28
    assert comparisons.table["prompt"].n_unique() == 805
    assert comparisons.baseline_length == pytest.approx(2049.4, abs=0.1)
    # A judge that likes length: each model's own coefficient says so.
    assert all(model.length_coefficient > 0.5 for model in fitted.models)
    assert fitted.difficulty.dispersion == pytest.approx(0.63, abs=0.05)


def test_a_model_that_is_left_out_is_judged_by_the_difficulty_of_the_others(
    comparisons: Comparisons, official: dict[str, float]
) -> None:
    found = []
    for name in sorted(official):
        others = replace(comparisons, table=comparisons.table.filter(pl.col("model") != name))
        alone = replace(comparisons, table=comparisons.table.filter(pl.col("model") == name))
        difficulty = estimate_win_rates(others, resamples=0).difficulty
        found.append(differences(estimate_win_rates(alone, difficulty, resamples=0), official)[0])
    assert np.abs(found).mean() < 0.9


def test_the_intervals_are_wider_where_length_is_controlled_for(comparisons: Comparisons) -> None:
    rates = estimate_win_rates(comparisons, resamples=30).models
    for model in rates:
        low, high = model.length_controlled_win_rate_ci95
        assert low < model.length_controlled_win_rate < high
        assert 0.5 < high - low < 25
    widths = [[high - low for low, high in (m.win_rate_ci95, m.length_controlled_win_rate_ci95)] for m in rates]
    raw, controlled = np.array(widths).T
    assert controlled.mean() > raw.mean()
