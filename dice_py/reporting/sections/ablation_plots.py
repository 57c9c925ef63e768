"""The plots of an ablation: each metric by round with a line for each arm, and quality against KL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dice_py.reporting import charts
from dice_py.reporting.ablation_results import (
    START,
    Measured,
    column_places,
    frontier_metrics,
    history,
    intervals_text,
    place_text,
    seed_texts,
    shown_metrics,
)
from dice_py.reporting.charts import Row
from dice_py.reporting.views import Figure, Table

MOST_ARMS = len(charts.SERIES)
"""Arms of one plot."""
_FEWER = 6
"""Arms of one plot where there are more than `MOST_ARMS`."""
_LONGEST_NAME = 24
_CHANCE = ("_win_rate", "reward_accuracy")
"""Ends of the names of metrics that are 0.5 by chance."""
_WIDE, _HIGH = 540, 300
"""Of the frontier, in pixels."""
_DODGE, _SPREAD = 0.09, 0.6
"""Between two arms of a round, and between the first and the last, in rounds, at most."""

Arms = Sequence[Mapping[str, Any]]


def by_round(results: Mapping[str, Any]) -> list[Figure]:
    """Each shown metric by round; of many arms several plots, on one scale."""
    metrics, _ = shown_metrics(results)
    return [figure for metric, title in metrics.items() for figure in _metric(results, metric, title)]


def frontier(results: Mapping[str, Any]) -> list[Figure]:
    """The judge's score against the KL to the start: a path over the rounds for each arm."""
    found = frontier_metrics(results)
    if found is None:
        return []
    kl, quality = found
    figures = []
    paths = {arm["arm"]: _path(arm, kl, quality) for arm in results["arms"]}
    domains = [_domain([row[axis] for path in paths.values() for row in path for axis in axes])
               for axes in (("x", "x_low", "x_high"), ("y", "y_low", "y_high"))]  # fmt: skip
    for arms, part in _groups(results["arms"]):
        names = _names(arms)
        rows = [row | {"series": name} for arm, name in zip(arms, names, strict=True) for row in paths[arm["arm"]]]
        if not rows:
            continue
        told = [_told_path(name, paths[arm["arm"]]) for arm, name in zip(arms, names, strict=True) if paths[arm["arm"]]]
        title = f"{quality.replace('_', ' ')} against KL to the start{part}"
        words = f"{title}, a path over the rounds for each arm, with {intervals_text(results)}. {'; '.join(told)}."
        chart = _frontier_chart(names, quality.replace("_", " "), domains)
        note = "Numbers at the points are rounds. Farther up is better, farther to the left is nearer to the start."
        figures.append(Figure(title, charts.svg(chart, rows, words), note))
    return figures


def _metric(results: Mapping[str, Any], metric: str, title: str) -> list[Figure]:
    histories = {arm["arm"]: history(arm, metric) for arm in results["arms"]}
    values = [value for rounds in histories.values() for value in rounds.values()]
    domain = _domain([end for value in values for end in (value.mean, value.low, value.high, *value.by_seed)])
    first = min((place for rounds in histories.values() for place in rounds), default=START)
    figures = []
    for arms, part in _groups(results["arms"]):
        names = _names(arms)
        rows: list[Row] = []
        told = []
        for place, (arm, name) in enumerate(zip(arms, names, strict=True)):
            of_arm = histories[arm["arm"]]
            rows += _rows(of_arm, name, _shift(place, len(arms)))
            if of_arm:
                told.append(f"{name}: {', '.join(f'{v.text()} at {place_text(n)}' for n, v in of_arm.items())}")
        if not rows:
            continue
        at_chance = 0.5 if metric.endswith(_CHANCE) else None
        chart = _round_chart(names, (first, results["rounds"]), domain, at_chance)
        words = f"{title}{part} by round, with {intervals_text(results)}. {'; '.join(told)}."
        table = _by_seed(results, arms, histories, f"{title}{part}, by seed")
        figures.append(Figure(f"{title}{part}", charts.svg(chart, rows, words), "", table))
    return figures


def _groups(arms: Arms) -> list[tuple[Arms, str]]:
    """The arms of each plot, with words that tell the plots apart."""
    if len(arms) <= MOST_ARMS:
        return [(arms, "")]
    plots = -(-len(arms) // _FEWER)
    size = -(-len(arms) // plots)
    return [
        (arms[first : first + size], f" (arms {first + 1} to {min(first + size, len(arms))} of {len(arms)})")
        for first in range(0, len(arms), size)
    ]


def _names(arms: Arms) -> list[str]:
    """What legends call the arms: their names, cut so that a legend stays readable, and no two equal."""
    names: list[str] = []
    for arm in arms:
        whole = arm["arm"]
        name = cut = whole if len(whole) <= _LONGEST_NAME else whole[: _LONGEST_NAME - 1] + "…"
        number = 1
        while name in names:
            number += 1
            name = f"{cut} ({number})"
        names.append(name)
    return names


def _shift(place: int, arms: int) -> float:
    """How far beside its round an arm stands, so that error bars do not cover one another."""
    step = min(_DODGE, _SPREAD / arms)
    return step * (place - (arms - 1) / 2)


def _rows(of_arm: Mapping[int, Measured], name: str, shift: float) -> list[Row]:
    rows: list[Row] = []
    for number, value in of_arm.items():
        at = {"x": number + shift, "series": name}
        rows.append(at | {"kind": "mean", "y": value.mean, "low": value.low, "high": value.high})
        dots = [each for each in value.by_seed if each is not None]
        rows += [at | {"kind": "seed", "y": each} for each in dots if len(dots) > 1]
    return rows


def _domain(values: Sequence[float | None]) -> tuple[float, float]:
    """The range of an axis, with some room."""
    known = [value for value in values if value is not None]
    if not known:
        return 0.0, 1.0
    room = 0.06 * (max(known) - min(known)) or 0.05 * abs(known[0]) or 0.5
    return min(known) - room, max(known) + room


def _round_chart(
    names: list[str], rounds: tuple[int, int], domain: tuple[float, float], at_chance: float | None
) -> charts.Chart:
    import altair as alt

    first, last = rounds
    words = f"datum.value == {START} ? 'start' : format(datum.value, 'd')"
    axis = alt.Axis(values=list(range(first, last + 1)), labelExpr=words, grid=False)
    scale = alt.Scale(domain=[first - 0.4, last + 0.4], nice=False, zero=False)
    x = alt.X("x:Q", title="round", axis=axis, scale=scale)
    y = alt.Y(**charts.number_axis("y", "", domain=domain))
    styles = charts.by_series(names)
    base = alt.Chart(charts.data())
    means = base.transform_filter("datum.kind == 'mean'")
    layers = [
        base.transform_filter("datum.kind == 'seed'")
        .mark_point(size=9, opacity=0.55)
        .encode(x=x, y=y, color=styles["color"]),
        means.transform_filter("isValid(datum.low)")
        .mark_rule(strokeWidth=1.4)
        .encode(x=x, y=alt.Y("low:Q"), y2="high:Q", color=styles["color"]),
        means.mark_line().encode(x=x, y=y, order=alt.Order("x:Q"), **styles),
        means.mark_point().encode(x=x, y=y, color=styles["color"]),
    ]
    if at_chance is not None and domain[0] <= at_chance <= domain[1]:
        layers.insert(0, charts.level(base, at_chance, strokeDash=[3, 3]))
    return alt.layer(*layers)


def _by_seed(
    results: Mapping[str, Any], arms: Arms, histories: Mapping[str, Mapping[int, Measured]], caption: str
) -> Table | None:
    """The values of the dots."""
    seeds = results["seeds"]
    if len(seeds) < 2:
        return None
    places = column_places([value for of_arm in histories.values() for value in of_arm.values()])
    rows = [
        [f"{arm['arm']}, {place_text(number)}", *seed_texts(value, arm["seeds"], seeds, places)]
        for arm in arms
        for number, value in histories[arm["arm"]].items()
        if value.by_seed
    ]
    return Table(caption, ["", *(f"seed {seed}" for seed in seeds)], rows)


def _path(arm: Mapping[str, Any], kl: str, quality: str) -> list[Row]:
    """The points of an arm, one for each round of which both are known."""
    across, up = history(arm, kl), history(arm, quality)
    return [
        {
            "round": str(number) if number != START else "",
            "place": number,
            "x": across[number].mean, "x_low": across[number].low, "x_high": across[number].high,
            "y": up[number].mean, "y_low": up[number].low, "y_high": up[number].high,
        }
        for number in sorted(across.keys() & up.keys())
    ]  # fmt: skip


def _told_path(name: str, path: Sequence[Row]) -> str:
    points = [f"{row['y']:.3g} at KL {row['x']:.3g} ({place_text(row['place'])})" for row in path]
    return f"{name}: {', '.join(points)}"


def _frontier_chart(names: list[str], quality: str, domains: Sequence[tuple[float, float]]) -> charts.Chart:
    import altair as alt

    x = alt.X(**charts.number_axis("x", "KL to the start (nats a response)", domain=domains[0]))
    y = alt.Y(**charts.number_axis("y", quality, domain=domains[1]))
    styles = charts.by_series(names)
    base = alt.Chart(charts.data())
    bars: dict[str, Any] = {"strokeWidth": 1, "opacity": 0.6}
    return alt.layer(
        base.transform_filter("isValid(datum.y_low)")
        .mark_rule(**bars)
        .encode(x=x, y=alt.Y("y_low:Q"), y2="y_high:Q", color=styles["color"]),
        base.transform_filter("isValid(datum.x_low)")
        .mark_rule(**bars)
        .encode(x=alt.X("x_low:Q"), x2="x_high:Q", y=y, color=styles["color"]),
        base.mark_line().encode(x=x, y=y, order=alt.Order("place:Q"), **styles),
        base.mark_point().encode(x=x, y=y, color=styles["color"]),
        base.mark_text(dx=7, dy=-7, fontSize=11, fill="currentColor").encode(x=x, y=y, text="round:N"),
    ).properties(width=_WIDE, height=_HIGH)
