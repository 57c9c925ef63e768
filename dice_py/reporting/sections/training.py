"""The section Training: the trainer's log of all rounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from dice_py.reporting import charts
from dice_py.reporting.charts import Row
from dice_py.reporting.formatting import number
from dice_py.reporting.stored_run import StoredRun
from dice_py.reporting.views import Figure, Table

Plots = Sequence[tuple[str, tuple[str, ...]]]
"""Titles, each with its metrics of the log."""
Logs = list[tuple[str, int, list[dict[str, Any]]]]
"""Of each run and round, the entries of a log."""

_PLOTS: Plots = (
    ("Loss", ("loss",)),
    ("Reward margin", ("rewards/margins",)),
    ("Accuracy: pairs whose chosen has the higher reward", ("rewards/accuracies",)),
    ("Log-probability of chosen and rejected", ("logps/chosen", "logps/rejected")),
    ("Reward of chosen and rejected", ("rewards/chosen", "rewards/rejected")),
    ("Gradient norm", ("grad_norm",)),
    ("Learning rate", ("learning_rate",)),
)
_REINFORCEMENT_PLOTS: Plots = (
    ("Stage 2: reward of the sampled responses", ("reward",)),
    ("Stage 2: KL divergence from the policy of stage 1, nats a token", ("kl",)),
    ("Stage 2: mean length of the sampled responses, tokens", ("completions/mean_length",)),
    ("Stage 2: entropy, nats a token", ("entropy",)),
)
"""Of the hard prompts, with train.method=mpo."""
_FROM_ZERO = ("grad_norm", "learning_rate")
"""Metrics whose axis begins at zero."""
_FEW = 12
"""Entries of a log up to which each is a dot on its line."""
_MOST_POINTS = 1000
"""Points of a plot; of longer logs every k-th entry is drawn."""


def training(runs: list[StoredRun], *, draws: bool) -> dict[str, Any]:
    """`figures` and `tables` of all rounds, `note` on what is drawn."""
    rounds = [(run.name, each) for run in runs for each in run.rounds]
    first = _of_stage(runs, [(name, each.number, each.log) for name, each in rounds if each.log], _PLOTS, draws)
    further = [(name, each.number, each.reinforcement_log) for name, each in rounds if each.reinforcement_log]
    second = _of_stage(runs, further, _REINFORCEMENT_PLOTS, draws)
    return {
        "figures": first["figures"] + second["figures"],
        "tables": first["tables"] + second["tables"],
        "note": first["note"] or second["note"],
    }


def _of_stage(runs: list[StoredRun], logs: Logs, plots: Plots, draws: bool) -> dict[str, Any]:
    """`training`, of one of its stages."""
    if not logs:
        return {"figures": [], "tables": [], "note": ""}
    is_one_round = len({round_number for _, round_number, _ in logs}) == 1
    figures: list[Figure] = []
    for title, metrics in plots if draws else ():
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
    return {"figures": figures, "tables": [_last_values(logs, plots, len(runs) > 1)], "note": " ".join(notes)}


def _most(lines: int) -> int:
    return max(20, _MOST_POINTS // lines)


def _figure(title: str, metrics: tuple[str, ...], logs: Logs, is_one_round: bool) -> list[Figure]:
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


def _last_values(logs: Logs, plots: Plots, several: bool) -> Table:
    """The last value of each metric, a row for each round."""
    metrics = [metric for _, group in plots for metric in group if any(metric in e for _, _, log in logs for e in log)]
    rows = []
    for run, round_number, log in logs:
        name = f"{run}, round {round_number}" if several else f"round {round_number}"
        values = [next((entry[metric] for entry in reversed(log) if metric in entry), None) for metric in metrics]
        rows.append([name, number(log[-1]["step"]), *(number(value) for value in values)])
    what = "last values of the trainer's log" if plots is _PLOTS else "last values of the log of stage 2"
    return Table(what, ["", "step", *metrics], rows)
