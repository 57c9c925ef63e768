"""The section Training: the trainer's log of all rounds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dice_py.reporting import charts
from dice_py.reporting.charts import Row
from dice_py.reporting.formatting import number
from dice_py.reporting.stored_run import StoredRun
from dice_py.reporting.views import Figure, Table

_PLOTS = (
    ("Loss", ("loss",)),
    ("Reward margin", ("rewards/margins",)),
    ("Accuracy: pairs whose chosen has the higher reward", ("rewards/accuracies",)),
    ("Log-probability of chosen and rejected", ("logps/chosen", "logps/rejected")),
    ("Reward of chosen and rejected", ("rewards/chosen", "rewards/rejected")),
    ("Gradient norm", ("grad_norm",)),
    ("Learning rate", ("learning_rate",)),
)
_FROM_ZERO = ("grad_norm", "learning_rate")
"""Metrics whose axis begins at zero."""
_FEW = 12
"""Entries of a log up to which each is a dot on its line."""
_MOST_POINTS = 1000
"""Points of a plot; of longer logs every k-th entry is drawn."""


def training(runs: list[StoredRun], *, draws: bool) -> dict[str, Any]:
    """`figures` and `tables` of all rounds, `note` on what is drawn."""
    logs = [(run.name, each.number, each.log) for run in runs for each in run.rounds if each.log]
    if not logs:
        return {"figures": [], "tables": [], "note": ""}
    is_one_round = len({round_number for _, round_number, _ in logs}) == 1
    figures: list[Figure] = []
    for title, metrics in _PLOTS if draws else ():
        # Of several runs, the runs are the series; of one run chosen and rejected are.
        groups = [metrics] if len(runs) == 1 else [(metric,) for metric in metrics]
        for group in groups:
            label = title if len(group) == len(metrics) else f"{title}: {group[0].rpartition('/')[2]}"
            figures += _figure(label, group, logs, is_one_round)
    most = _most(len(logs))
    notes = [] if is_one_round else ["Rounds stand one after another, each with its own line; 1 is the end of round 1."]
    every = max(-(-len(log) // most) for _, _, log in logs)
    if every > 1:
        notes.append(f"Of long logs every k-th entry is drawn (k up to {every}), and the last.")
    return {"figures": figures, "tables": [_last_values(logs, len(runs) > 1)], "note": " ".join(notes)}


def _most(lines: int) -> int:
    return max(20, _MOST_POINTS // lines)


def _figure(
    title: str, metrics: tuple[str, ...], logs: list[tuple[str, int, list[dict[str, Any]]]], is_one_round: bool
) -> list[Figure]:
    rows: list[Row] = []
    told = []
    names: dict[str, None] = {}
    for run, round_number, log in logs:
        for metric in metrics:
            entries = [entry for entry in log if metric in entry]
            if not entries:
                continue
            series = metric.rpartition("/")[2] if len(metrics) > 1 else run
            names[series] = None
            last = max(entry["step"] for entry in log) or 1
            for entry in charts.thinned(entries, _most(len(logs) * len(metrics))):
                x = entry["step"] if is_one_round else round_number - 1 + entry["step"] / last
                line = f"{run} {metric} {round_number}"
                rows.append({"x": x, "y": entry[metric], "series": series, "line": line, "few": len(entries) <= _FEW})
            first, end = number(entries[0][metric]), number(entries[-1][metric])
            told.append(f"{series}, round {round_number}: {first} to {end}")
    if not rows:
        return []
    axis = "step" if is_one_round else "rounds trained"
    from_zero = metrics[0] in _FROM_ZERO
    picture = charts.svg(
        _line_chart(list(names), axis, from_zero), rows, f"{title} by {axis}. {'; '.join(_few(told))}."
    )
    return [Figure(title, picture)]


def _few(told: list[str]) -> Iterator[str]:
    """The first and the last of many sentences."""
    if len(told) <= 8:
        yield from told
    else:
        yield from (*told[:2], f"{len(told) - 4} more lines", *told[-2:])


def _line_chart(names: list[str], x_title: str, from_zero: bool) -> charts.Chart:
    import altair as alt

    x, y = alt.X(**charts.number_axis("x", x_title, zero=True)), alt.Y(**charts.number_axis("y", "", zero=from_zero))
    styles = charts.by_series(names)
    base = alt.Chart(charts.data())
    line = base.mark_line().encode(x=x, y=y, detail="line:N", order=alt.Order("x:Q"), **styles)
    dots = base.transform_filter("datum.few").mark_point().encode(x=x, y=y, color=styles["color"])
    return alt.layer(line, dots)


def _last_values(logs: list[tuple[str, int, list[dict[str, Any]]]], several: bool) -> Table:
    """The last value of each metric, a row for each round."""
    metrics = [metric for _, group in _PLOTS for metric in group if any(metric in e for _, _, log in logs for e in log)]
    rows = []
    for run, round_number, log in logs:
        name = f"{run}, round {round_number}" if several else f"round {round_number}"
        values = [next((entry[metric] for entry in reversed(log) if metric in entry), None) for metric in metrics]
        rows.append([name, number(log[-1]["step"]), *(number(value) for value in values)])
    return Table("last values of the trainer's log", ["", "step", *metrics], rows)
