"""How far `dice winrate` is from AlpacaEval's own length-controlled figures: `make bench-winrate` (`--help`).

It needs verdicts on many models against one baseline, and the official figures of some of them. AlpacaEval's public
results have both (CC BY-NC 4.0, so they are not part of this repository): a table of its scored responses with a JSON
object {"length_controlled_winrate": {model: percent}}, or its annotations.json files with its leaderboard.csv. Prints
tables, and writes results/winrate.json:

    official        each model's figure, the official one, and their difference; mean absolute and largest difference
    ridge           cross-entropy of left-out verdicts (a fifth of them, five times) for each ridge on γ, with each
                    model by itself, and with the coefficients of length and difficulty pulled together
    models          differences where 1, 2, 3, … models drawn at random are fitted jointly; of those models, and of the
                    others, which take the difficulty of that fit
    intervals       seconds of a resample, and the mean standard error where γ is fitted again and where it is fixed
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.console import Console
from rich.table import Table

from dice_py.evaluation.winrate.comparisons import Comparisons
from dice_py.evaluation.winrate.length_control import RIDGE, WinRates, build_design, estimate_win_rates
from dice_py.evaluation.winrate.logistic import (
    Cells,
    Prior,
    chance_at_equal_length,
    dispersion_of,
    fit_each,
    fit_joint,
    pooled_prior,
)
from dice_py.evaluation.winrate.reading import read_comparisons
from dice_py.storage.files import write_json

HERE = Path(__file__).resolve().parent
RIDGES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
COUNTS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 20, 24, 32, 40, 48)
FOLDS = 5

Official = dict[str, float]


def read_official(path: Path) -> Official:
    """Length-controlled win rates by model, in percent: of a JSON object, or of AlpacaEval's leaderboard.csv."""
    if path.suffix == ".json":
        return dict(json.loads(path.read_text(encoding="utf-8"))["length_controlled_winrate"])
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {row[""]: float(row["length_controlled_winrate"]) for row in rows if row["length_controlled_winrate"]}


def differences(rates: WinRates, official: Official) -> dict[str, float]:
    """Ours minus the official figure, in points, of the models that have one."""
    return {
        model.model: model.length_controlled_win_rate - official[model.model]
        for model in rates.models
        if model.model in official and model.length_controlled_win_rate is not None
    }


def spread(values: list[float]) -> dict[str, float | int]:
    """Mean absolute value, mean and largest absolute value, in points."""
    array = np.array(values)
    return {
        "models": len(values),
        "mean_absolute": float(np.abs(array).mean()),
        "mean": float(array.mean()),
        "largest": float(np.abs(array).max()),
    }


def subset(comparisons: Comparisons, models: list[str]) -> Comparisons:
    """The comparisons of some of the models."""
    return replace(comparisons, table=comparisons.table.filter(pl.col("model").is_in(models)))


def by_themselves(comparisons: Comparisons) -> dict[str, float]:
    """The length-controlled win rates where each model's coefficients are fitted from its own verdicts alone."""
    design = build_design(comparisons)
    cells, once = design.cells, np.ones(len(design.prompts))
    gamma = fit_joint(cells, once, RIDGE).difficulty
    chance = chance_at_equal_length(fit_each(cells, once, gamma, Prior()).coefficients, gamma)
    rates = 100 * (cells.weight * chance).sum(1) / cells.weight.sum(1)
    return dict(zip(design.models, rates.tolist(), strict=True))


def against_official(comparisons: Comparisons, official: Official) -> dict[str, Any]:
    """Section `official`."""
    rates = estimate_win_rates(comparisons, resamples=0)
    found = differences(rates, official)
    models = [
        {
            "model": model.model,
            "win_rate": model.win_rate,
            "length_controlled_win_rate": model.length_controlled_win_rate,
            "official": official[model.model],
            "difference": found[model.model],
            "mean_length": model.mean_length,
        }
        for model in rates.models
        if model.model in found
    ]
    raw = [float(model["win_rate"]) - float(model["official"]) for model in models]
    alone = [rate - official[name] for name, rate in by_themselves(comparisons).items() if name in official]
    models.sort(key=lambda model: -abs(model["difference"]))
    return {
        "fitted_models": len(rates.models),
        **spread(list(found.values())),
        "without_pulling_together": spread(alone),
        "raw": spread(raw),
        "by_model": models,
    }


def left_out_entropy(comparisons: Comparisons, ridge: float, seed: int) -> dict[str, float]:
    """Mean cross-entropy of left-out verdicts in nats, of both ways to fit a model."""
    cells = build_design(comparisons).cells
    prompts = cells.weight.shape[1]
    fold = np.random.default_rng(seed).integers(0, FOLDS, cells.weight.shape)
    total: dict[str, float] = {"by itself": 0.0, "pulled together": 0.0}
    for left_out in range(FOLDS):
        kept = Cells(cells.preference, cells.length, cells.weight * (fold != left_out))
        test = cells.weight * (fold == left_out)
        once = np.ones(prompts)
        joint = fit_joint(kept, once, ridge)
        gamma = joint.difficulty
        free = fit_each(kept, once, gamma, Prior())
        dispersion = dispersion_of(kept, once, free, gamma, joint.freedom)
        prior = pooled_prior(replace(free, variance=dispersion * free.variance), kept.has_data())
        pulled = fit_each(kept, once, gamma, prior, dispersion)
        for name, fit in (("by itself", free), ("pulled together", pulled)):
            phi, psi, theta = np.split(fit.coefficients, 3, axis=1)
            logits = phi * cells.length + psi * gamma + theta
            entropy = np.logaddexp(0.0, logits) - cells.preference * logits
            total[name] += float((test * entropy).sum())
    return {name: value / float(cells.weight.sum()) for name, value in total.items()}


def by_number(comparisons: Comparisons, official: Official, draws: int, seed: int) -> list[dict[str, Any]]:
    """Section `models`."""
    names = comparisons.models
    rows = []
    for count in [count for count in COUNTS if count < len(names)]:
        rng = np.random.default_rng([seed, count])
        inside: list[float] = []
        outside: list[float] = []
        for _ in range(draws):
            chosen = [names[at] for at in rng.choice(len(names), count, replace=False)]
            rates = estimate_win_rates(subset(comparisons, chosen), resamples=0)
            inside += differences(rates, official).values()
            if count > 1:
                others = subset(comparisons, [name for name in names if name not in chosen])
                outside += differences(estimate_win_rates(others, rates.difficulty, resamples=0), official).values()
        rows.append(
            {"models": count, "fitted": spread(inside), "with_its_difficulty": spread(outside) if outside else None}
        )
    return rows


def of_intervals(comparisons: Comparisons, resamples: int) -> dict[str, float | int]:
    """Section `intervals`."""
    began = time.perf_counter()
    again = estimate_win_rates(comparisons, resamples=resamples)
    seconds = time.perf_counter() - began
    fixed = estimate_win_rates(comparisons, again.difficulty, resamples=resamples)

    def width(rates: WinRates) -> float:
        intervals = [model.length_controlled_win_rate_ci95 for model in rates.models]
        return float(np.mean([high - low for low, high in filter(None, intervals)]))

    return {
        "resamples": resamples,
        "seconds_per_resample": seconds / resamples,
        "mean_width_fitted_again": width(again),
        "mean_width_difficulty_fixed": width(fixed),
    }


def show(result: dict[str, Any]) -> None:
    """Prints the sections as tables."""
    console = Console()
    official = result["official"]
    table = Table("model", "raw", "ours", "official", "difference", title="points", box=None)
    for row in official["by_model"]:
        figures = (row[name] for name in ("win_rate", "length_controlled_win_rate", "official", "difference"))
        table.add_row(row["model"], *(f"{figure:.2f}" for figure in figures))
    console.print(table)
    console.print(
        f"mean absolute difference {official['mean_absolute']:.2f}, largest {official['largest']:.2f}; "
        f"of models by themselves {official['without_pulling_together']['mean_absolute']:.2f}, of the raw rate "
        f"{official['raw']['mean_absolute']:.2f}"
    )
    table = Table("ridge", "by itself", "pulled together", title="left-out cross-entropy", box=None)
    for ridge, entropy in result["ridge"].items():
        table.add_row(ridge, *(f"{value:.5f}" for value in entropy.values()))
    console.print(table)
    table = Table("models", "mean absolute", "largest", "others with its γ", title="joint fits", box=None)
    for row in result["models"]:
        outside = row["with_its_difficulty"]
        table.add_row(
            str(row["models"]),
            f"{row['fitted']['mean_absolute']:.2f}",
            f"{row['fitted']['largest']:.2f}",
            "–" if outside is None else f"{outside['mean_absolute']:.2f}",
        )
    console.print(table)
    console.print(result["intervals"])


def main(arguments: list[str] | None = None) -> None:
    """Runs the bench."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="what `dice winrate` reads")
    parser.add_argument("--official", type=Path, required=True, help="official figures, .json or .csv")
    parser.add_argument("--baseline", default="gpt4_1106_preview")
    parser.add_argument("--draws", type=int, default=50, help="random sets of models for each number")
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "results/winrate.json")
    given = parser.parse_args(arguments)
    comparisons = read_comparisons(given.data, given.baseline)
    official = read_official(given.official)
    result = {
        "ridge_used": RIDGE,
        "official": against_official(comparisons, official),
        "ridge": {f"{ridge:g}": left_out_entropy(comparisons, ridge, given.seed) for ridge in RIDGES},
        "models": by_number(comparisons, official, given.draws, given.seed),
        "intervals": of_intervals(comparisons, given.resamples),
    }
    show(result)
    write_json(given.out, result)


if __name__ == "__main__":
    main()
