"""The results of an ablation: every metric of every arm and round over the seeds, and the claims.

All of it is read from the run folders, whose evaluations have the metrics and their values by prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import polars as pl

from dice_py.ablation.arms import Arm
from dice_py.ablation.claims import LENGTH, contrasts
from dice_py.ablation.statistics import Value, over_seeds
from dice_py.config.judges import JudgesConfig
from dice_py.config.run import RunConfig
from dice_py.evaluation.values import change
from dice_py.runs.folder import round_name
from dice_py.runs.round_models import TRAINING_STAGES
from dice_py.storage.files import Manifest
from dice_py.storage.parquet import read_parquet

_MINED = ("pairs", "alpha", "mean_length_gap_before", "mean_length_gap_after", "mean_margin")
_START = "implicit_reward_accuracy"
_INITIAL = f"{_START}_initial_reference"
"""Of the start there is the first alone: its reward is against the first reference."""
_NOT_METRICS = ("eval_prompts", "eval_samples", "eval_pairs")


@dataclass(frozen=True)
class _Evaluated:
    """What one run has measured."""

    folder: Path
    metrics: list[dict[str, Any]]
    """By round, from 1."""
    mined: list[dict[str, Any]]
    trained: list[dict[str, Any]]


def quality_metric(config: RunConfig) -> str:
    """The metric by which claims are judged: the win rate over the start by the oracle of the world, or by the first
    judge; without one, the accuracy of the implicit reward on held-out pairs."""
    if config.is_world:
        return "oracle_win_rate"
    judges = [name for name in JudgesConfig.model_fields if getattr(config.evaluate.judges, name) is not None]
    return f"{judges[0]}_win_rate" if judges else _INITIAL


def compared_metrics(quality: str) -> list[str]:
    """The metrics of the claims: the quality, the scores that it comes from, and the length in tokens."""
    judge = quality.removesuffix("_win_rate")
    scores = [] if judge == quality else [f"{judge}_score", *(["oracle_accuracy"] if judge == "oracle" else [])]
    return [quality, *scores, LENGTH]


def read_results(
    folders: Mapping[tuple[str, int], Path], arms: Sequence[Arm], seeds: Sequence[int], base: RunConfig
) -> dict[str, Any]:
    """The results of all complete runs, ready for JSON (docs/ablation.md has the form).

    Args:
        folders: the run folder of each arm and seed.
        base: what all arms share.
    """
    rounds, quality = base.rounds.count, quality_metric(base)
    runs = {place: _read(folder, rounds) for place, folder in folders.items()}
    done = {place: run for place, run in runs.items() if run is not None}
    of_arm = {arm.name: [seed for seed in seeds if (arm.name, seed) in done] for arm in arms}

    def difference(arm: str, number: int, other: str, other_number: int, metric: str) -> Value | None:
        shared = [seed for seed in of_arm[arm] if seed in of_arm[other]]
        return _difference([(done[arm, s], number, done[other, s], other_number) for s in shared], metric)

    return {
        "version": 1,
        "rounds": rounds,
        "seeds": list(seeds),
        "interval": "seeds" if len(seeds) > 1 else "prompts",
        "is_world": base.is_world,
        "quality": quality,
        "arms": [
            {
                "arm": arm.name,
                "label": arm.label,
                "settings": arm.settings,
                "seeds": of_arm[arm.name],
                **_arm_values([done[arm.name, seed] for seed in of_arm[arm.name]], rounds, quality),
            }
            for arm in arms
        ],
        "contrasts": contrasts(arms, rounds, compared_metrics(quality), difference),
        "unfinished": [f"{arm}/seed-{seed}" for (arm, seed), run in runs.items() if run is None],
        "gaps": _gaps(done),
        "notes": list(dict.fromkeys(_notes(done.values()))),
    }


def _notes(runs: Iterable[_Evaluated]) -> Iterator[str]:
    """What the evaluations say of their figures."""
    for run in runs:
        for metrics in run.metrics:
            if "kl_and_entropy" in metrics:
                yield metrics["kl_and_entropy"]


def _gaps(done: Mapping[tuple[str, int], _Evaluated]) -> list[str]:
    """Metrics that some runs of an arm lack and others have: a value over seeds needs them in all seeds."""
    gaps = []
    for arm, seed in done:
        for number, metrics in enumerate(done[arm, seed].metrics):
            others = [run.metrics[number] for (name, _), run in done.items() if name == arm]
            known = {name for other in others for name, value in other.items() if _is_number(value)}
            lacking = sorted(name for name in known if not _is_number(metrics.get(name)))
            if lacking:
                gaps.append(f"{arm}/seed-{seed}, round {number + 1}: {', '.join(lacking)}")
    return gaps


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read(folder: Path, rounds: int) -> _Evaluated | None:
    manifest = Manifest(folder / "manifest.json")
    entries = {
        stage: [manifest.stage(f"{round_name(number)}/{stage}") or {} for number in range(1, rounds + 1)]
        for stage in ("evaluate", "mine")
    }
    if any(entry.get("status") != "done" for part in entries.values() for entry in part):
        return None
    metrics, mined = ([entry["counts"] for entry in entries[stage]] for stage in ("evaluate", "mine"))
    return _Evaluated(folder, metrics, mined, [_trained(manifest, number) for number in range(1, rounds + 1)])


def _trained(manifest: Manifest, number: int) -> dict[str, int]:
    """`response_tokens` of a round: those that all of its trainings trained on."""
    counts = [(manifest.stage(f"{round_name(number)}/{stage}") or {}).get("counts", {}) for stage in TRAINING_STAGES]
    trained = [each["response_tokens"] for each in counts if "response_tokens" in each]
    return {"response_tokens": sum(trained)} if trained else {}


def _arm_values(runs: Sequence[_Evaluated], rounds: int, quality: str) -> dict[str, Any]:
    if not runs:
        return {"start": {}, "rounds": []}
    first = [run.metrics[0] for run in runs]
    start = {name.removeprefix("start_"): value for name, value in _values(first).items() if name.startswith("start_")}
    if quality.endswith("_win_rate"):
        start[quality] = over_seeds([0.5] * len(runs))  # of π_1 against itself
    elif _START in start:
        start[quality] = start[_START]  # of one policy the first reference is the only one
    if "kl_to_start" in first[0]:
        start["kl_to_start"] = over_seeds([0.0] * len(runs))
    by_round = []
    for number in range(rounds):
        metrics = _values([run.metrics[number] for run in runs])
        kept = {name: value for name, value in metrics.items() if not name.startswith("start_")}
        mining = _values([{name: run.mined[number].get(name) for name in _MINED} for run in runs])
        training = _values([run.trained[number] for run in runs])
        by_round.append({"round": number + 1, "metrics": kept, "mining": mining, "training": training})
    return {"start": start, "rounds": by_round}


def _values(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Value]:
    """The numbers that all seeds have, by name."""
    values: dict[str, Value] = {}
    for name in metrics[0]:
        column = [of_seed.get(name) for of_seed in metrics]
        numbers = [float(value) for value in column if _is_number(value)]
        if len(numbers) == len(column) and name not in _NOT_METRICS:
            values[name] = over_seeds(numbers, metrics[0].get(f"{name}_ci95"))
    return values


def _difference(pairs: Sequence[tuple[_Evaluated, int, _Evaluated, int]], metric: str) -> Value | None:
    differences = []
    for run, number, other, other_number in pairs:
        ends = _value(run, number, metric), _value(other, other_number, metric)
        if None in ends:
            return None
        differences.append(ends[0] - ends[1])  # type: ignore[operator]
    if not differences:
        return None
    interval = _over_prompts(pairs[0], metric) if len(pairs) == 1 else None
    return over_seeds(differences, interval)


def _value(run: _Evaluated, number: int, metric: str) -> float | None:
    if number:
        return run.metrics[number - 1].get(metric)
    if metric.endswith("_win_rate"):
        return 0.5
    return run.metrics[0].get(f"start_{_START if metric == _INITIAL else metric}")


def _over_prompts(pair: tuple[_Evaluated, int, _Evaluated, int], metric: str) -> list[float] | None:
    """The interval of a difference over prompts, by a bootstrap; None where the values by prompt are not kept."""
    run, number, other, other_number = pair
    after, before = _items(run, number, metric), _items(other, other_number, metric)
    return None if after.is_empty() or before.is_empty() else change(before, after, 0).ci95


def _items(run: _Evaluated, number: int, metric: str) -> pl.DataFrame:
    """`item` and `value` of a metric."""
    file = run.folder / round_name(number or 1) / "evaluate" / "values.parquet"
    values = read_parquet(file).filter(pl.col("metric") == metric)
    return values.select("item", value=pl.col("value" if number else "start")).drop_nulls()
