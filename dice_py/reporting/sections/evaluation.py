"""The section Evaluation: how each round's policy does on held-out data, as plots, then as a table."""

from __future__ import annotations

from typing import Any

from dice_py.config.rounds import COMMAND_PREFIX
from dice_py.reporting import charts
from dice_py.reporting.charts import Row
from dice_py.reporting.formatting import evaluation_notes, evaluation_rows, number
from dice_py.reporting.stored_run import StoredRun
from dice_py.reporting.views import Figure, Table

_MOST_PLOTS = 9
_ACCURACIES = ("implicit_reward_accuracy", "implicit_reward_accuracy_initial_reference", "oracle_accuracy")
_LAST = ("mean_response_tokens", "kl_to_start")
_INTERVAL = "_ci95"
_START = "start"


def evaluation(runs: list[StoredRun], *, draws: bool) -> dict[str, Any]:
    """`figures`, `tables` and `notes` of all rounds that were evaluated."""
    of_rounds = {(run.name, each.name): each.metrics for run in runs for each in run.rounds if each.metrics is not None}
    if not of_rounds:
        return {"figures": [], "tables": [], "notes": []}
    columns = {name if len(runs) == 1 else f"{run}, {name}": metrics for (run, name), metrics in of_rounds.items()}
    compared = dict.fromkeys(run.config.round_metric for run in runs if run.config is not None)
    figures = []
    if draws:
        shown = _plotted(list(columns.values()), [name for name in compared if name is not None])
        figures = [figure for metric in shown if (figure := _figure(runs, metric)) is not None]
    table = Table("on held-out prompts and pairs", ["", *columns], evaluation_rows(columns))
    return {"figures": figures, "tables": [table], "notes": evaluation_notes(columns)}


def _plotted(metrics: list[dict[str, Any]], first: list[str]) -> list[str]:
    """The metrics with a plot: that by which rounds are compared, win rates, accuracies, the mean length, KL."""
    names = list(dict.fromkeys(name for values in metrics for name in values))
    rates = [name for name in names if name.endswith("_win_rate")]
    own = [name for name in names if name.startswith(COMMAND_PREFIX)]
    wanted = [*first, *rates, *_ACCURACIES, *_LAST, *own]
    return [name for name in dict.fromkeys(wanted) if name in names][:_MOST_PLOTS]


def _figure(runs: list[StoredRun], metric: str) -> Figure | None:
    rows: list[Row] = []
    told = []
    for run in runs:
        values = [(each.number, each.metrics) for each in run.rounds if each.metrics is not None]
        values = [(place, metrics) for place, metrics in values if _is_number(metrics.get(metric))]
        start = values[0][1].get(f"start_{metric}") if values else None
        if _is_number(start):
            rows.append({"round": _START, "series": run.name, "value": start})
        for place, metrics in values:
            row = {"round": str(place), "series": run.name, "value": metrics[metric]}
            interval = metrics.get(metric + _INTERVAL)
            if isinstance(interval, list) and len(interval) == 2 and all(map(_is_number, interval)):
                row |= {"low": interval[0], "high": interval[1]}
            rows.append(row)
        if values:
            first, last = (number(metrics[metric]) for _, metrics in (values[0], values[-1]))
            of = f"{run.name}: " if len(runs) > 1 else ""
            before = f"{number(start)} at the start, " if _is_number(start) else ""
            told.append(f"{of}{before}{first} after round {values[0][0]}, {last} after round {values[-1][0]}")
    if not rows:
        return None
    title = metric.replace("_", " ")
    at_chance = 0.5 if metric.endswith(("win_rate", *_ACCURACIES)) else None
    chart = _chart([run.name for run in runs], rows, at_chance)
    return Figure(title, charts.svg(chart, rows, f"{title} by round, with 95 % intervals. {'; '.join(told)}."))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _chart(names: list[str], rows: list[Row], reference: float | None) -> charts.Chart:
    import altair as alt

    order = sorted({row["round"] for row in rows}, key=lambda name: -1 if name == _START else int(name))
    x: dict[str, Any] = {"x": alt.X("round:N", sort=order, title="round", axis=alt.Axis(labelAngle=0))}
    if len(names) > 1:
        x["xOffset"] = alt.XOffset("series:N")
    y = alt.Y(**charts.number_axis("value", ""))
    base = alt.Chart(charts.data())
    styles = charts.by_series(names)
    layers = [
        base.transform_filter("isValid(datum.low)")
        .mark_rule(strokeWidth=1.4)
        .encode(y="low:Q", y2="high:Q", color=styles["color"], **x),
        base.mark_line().encode(y=y, **x, **styles),
        base.mark_point().encode(y=y, color=styles["color"], **x),
    ]
    if reference is not None:
        layers.insert(0, charts.level(base, reference, strokeDash=[3, 3]))
    return alt.layer(*layers)
