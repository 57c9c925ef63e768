"""The tables of an ablation's page: what was run, the claims, and all numbers by arm and round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dice_py.reporting.ablation_results import (
    START,
    Measured,
    base_setting,
    claims_by_metric,
    column_places,
    column_texts,
    history,
    intervals_text,
    measured,
    place_text,
    seed_texts,
    seeds_of_contrast,
    setting_text,
    shown_metrics,
    verdict_text,
)
from dice_py.reporting.formatting import seconds
from dice_py.reporting.views import Table

_NOTHING = "–"


def facts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was run, as names and texts."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return [
        ("arms", ", ".join(arm["arm"] for arm in results["arms"])),
        ("rounds", str(results["rounds"])),
        ("seeds", ", ".join(map(str, results["seeds"]))),
        ("on", "the synthetic world" if results["is_world"] else "a model and data of the user's"),
        ("judged by", results["quality"].replace("_", " ")),
        ("intervals", intervals_text(results)),
        ("time", seconds(results["seconds"])),
        ("machine", results["machine"]),
        ("versions", versions or _NOTHING),
    ]


def arms_table(results: Mapping[str, Any]) -> Table:
    """Each arm with the settings that make it one."""
    names = dict.fromkeys(name for arm in results["arms"] for name in arm["settings"])
    columns = {
        name: [
            setting_text(arm["settings"][name]) if name in arm["settings"] else base_setting(results, name)
            for arm in results["arms"]
        ]
        for name in names
    }
    shown = {name: column for name, column in columns.items() if len(set(column)) > 1}
    rows = [
        [arm["arm"], arm["label"], *cells, ", ".join(map(str, arm["seeds"])) or "none yet"]
        for arm, *cells in zip(results["arms"], *shown.values(), strict=True)
    ]
    return Table("arms, and the settings in which they differ", ["arm", "", *shown, "seeds"], rows)


def settings_table(results: Mapping[str, Any]) -> Table:
    """The settings of all arms that are not the defaults."""
    rows = [[name, setting_text(value)] for name, value in results["settings"].items()]
    return Table("settings of all arms", ["not the default", "value"], rows or [["none", ""]])


def differences_text(results: Mapping[str, Any]) -> str:
    """What the differences and their intervals are, as a sentence."""
    within = "Differences are taken within each seed" if len(results["seeds"]) > 1 else "Differences are of one seed"
    return f"{within}, with {intervals_text(results)}."


def claims_tables(results: Mapping[str, Any]) -> tuple[list[Table], list[Table]]:
    """(the tables that are shown first, all others): the differences by each metric, with those of each seed."""
    first, others = claims_by_metric(results)
    captions = {metric: f"differences of {metric.replace('_', ' ')}" for metric in (*first, *others)}
    return (
        [_claims_table(results, captions[metric], contrasts) for metric, contrasts in first.items()],
        [
            _claims_table(results, captions[metric] + (", without a claim" if metric in first else ""), contrasts)
            for metric, contrasts in others.items()
        ],
    )


def _claims_table(results: Mapping[str, Any], caption: str, contrasts: list[Any]) -> Table:
    seeds = results["seeds"] if len(results["seeds"]) > 1 else []
    differences = [measured(each["difference"]) for each in contrasts]
    texts, places = column_texts(differences, signs=True), column_places(differences)
    rows = []
    for each, difference, text in zip(contrasts, differences, texts, strict=True):
        arms = each["arm"] if each["arm"] == each["against_arm"] else f"{each['arm']} − {each['against_arm']}"
        by_seed = seed_texts(difference, seeds_of_contrast(results, each), seeds, places, signs=True)
        rows.append([each["claim"], each["text"], arms, str(each["round"]), text, verdict_text(each), *by_seed])
    heads = ["claim", "", "arms", "round", "difference", "verdict", *(f"seed {seed}" for seed in seeds)]
    return Table(caption, heads, rows)


def numbers_table(results: Mapping[str, Any]) -> Table:
    """The shown metrics: a row for each arm and round."""
    metrics, _ = shown_metrics(results)
    heads, columns = rows_by_round(results, list(metrics))
    rows = [[f"{arm}, {place_text(number)}", *cells] for (arm, number), *cells in zip(heads, *columns, strict=True)]
    return Table("arms by round", ["", *metrics.values()], rows)


def rows_by_round(results: Mapping[str, Any], metrics: list[str]) -> tuple[list[tuple[str, int]], list[list[str]]]:
    """((arm, round) of each row in which one of the metrics is known, the texts of each metric in these rows)."""
    found = {
        (arm["arm"], number): [of.get(number) for of in histories]
        for arm in results["arms"]
        for histories in ([history(arm, metric) for metric in metrics],)
        for number in sorted({START, *(each["round"] for each in arm["rounds"])})
    }
    known = {place: values for place, values in found.items() if any(values)}
    return list(known), [column_texts([values[n] for values in known.values()]) for n in range(len(metrics))]


def arm_tables(arm: Mapping[str, Any]) -> list[Table]:
    """All that is known of one arm: every metric, what mining found and training saw, a column for each round."""
    heads = ["", *(place_text(each["round"]) for each in arm["rounds"])]
    found = []
    for part in ("metrics", "mining", "training"):
        columns = [each.get(part, {}) for each in arm["rounds"]]
        names = list(dict.fromkeys(name for column in columns for name in column))
        rows = [[name.replace("_", " "), *(_text(measured(column.get(name))) for column in columns)] for name in names]
        if rows:
            found.append(Table(f"{part} of {arm['arm']}", heads, rows))
    return found


def _text(value: Measured | None) -> str:
    return _NOTHING if value is None else value.text()
