"""The tables of an ablation's page: what was run, the claims, and all numbers by arm and round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dice_py.reporting.ablation_results import (
    START,
    Measured,
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
    """Each arm with what makes it one."""
    names = list(dict.fromkeys(name for arm in results["arms"] for name in arm["settings"]))
    rows = [
        [
            arm["arm"],
            arm["label"],
            *(setting_text(arm["settings"][name]) if name in arm["settings"] else _NOTHING for name in names),
            ", ".join(map(str, arm["seeds"])) or "none yet",
        ]
        for arm in results["arms"]
    ]
    return Table("arms, and the settings in which they differ", ["arm", "", *names, "seeds"], rows)


def settings_table(results: Mapping[str, Any]) -> Table:
    """The settings of all arms that are not the defaults."""
    rows = [[name, setting_text(value)] for name, value in results["settings"].items()]
    return Table("settings of all arms", ["not the default", "value"], rows or [["none", ""]])


def differences_text(results: Mapping[str, Any]) -> str:
    """What the differences and their intervals are, as a sentence."""
    within = "Differences are taken within each seed" if len(results["seeds"]) > 1 else "Differences are of one seed"
    return f"{within}, with {intervals_text(results)}."


def claims_table(results: Mapping[str, Any]) -> Table:
    """Each contrast with its difference and the verdict."""
    rows = []
    for each in results["contrasts"]:
        difference = measured(each["difference"])
        against = f"{each['against_arm']}, {place_text(each['against_round'])}"
        rows.append(
            [
                each["claim"],
                each["text"],
                f"{each['arm']}, {place_text(each['round'])} − {against}",
                each["metric"].replace("_", " "),
                _NOTHING if difference is None else difference.text(signs=True),
                verdict_text(each),
            ]
        )
    return Table("claims", ["claim", "", "arms", "metric", "difference", "verdict"], rows)


def claims_by_seed(results: Mapping[str, Any]) -> Table | None:
    """The difference of each contrast, seed by seed; None where there is one seed only."""
    seeds = results["seeds"]
    if len(seeds) < 2 or not results["contrasts"]:
        return None
    rows = [
        [
            f"{each['claim']}: {each['text']}",
            *seed_texts(measured(each["difference"]), seeds_of_contrast(results, each), seeds, signs=True),
        ]
        for each in results["contrasts"]
    ]
    return Table("differences by seed", ["", *(f"seed {seed}" for seed in seeds)], rows)


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
    """All that is known of one arm: every metric, and what mining found, a column for each round."""
    heads = ["", *(place_text(each["round"]) for each in arm["rounds"])]
    found = []
    for caption, part in (("metrics", "metrics"), ("mining", "mining")):
        columns = [each.get(part, {}) for each in arm["rounds"]]
        names = list(dict.fromkeys(name for column in columns for name in column))
        rows = [[name.replace("_", " "), *(_text(measured(column.get(name))) for column in columns)] for name in names]
        if rows:
            found.append(Table(f"{caption} of {arm['arm']}", heads, rows))
    return found


def _text(value: Measured | None) -> str:
    return _NOTHING if value is None else value.text()
