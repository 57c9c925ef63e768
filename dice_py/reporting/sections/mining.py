"""The section Mining: of each round what was mined, how the length penalty was found, and what else would be mined."""

from __future__ import annotations

import itertools
import math
from typing import Any

from dice_py.reporting import charts
from dice_py.reporting.charts import Row
from dice_py.reporting.formatting import mining_rows, number, share
from dice_py.reporting.stored_run import StoredRound, StoredRun
from dice_py.reporting.views import NOT_OURS, Figure, Table

_FINE_ROUNDS, _MOST_ROUNDS = 6, 20
"""Rounds, of all runs together, up to which histograms in two dimensions have their finest bins; and up to which
histograms are drawn of all rounds. Of more they are drawn of the last ones: the page stays small."""
_REASONS = {
    "null": "no reward or no length",
    "not_finite": "the reward is not finite",
    "truncated": "cut off by the token limit",
    "too_short": "shorter than mine.min_length, or white space alone",
    "too_long": "longer than mine.max_length",
    "duplicate": "equals another response of its prompt (mine.drop_duplicates)",
    "too_few_responses": "the prompt has fewer usable responses than mine.min_responses",
    "tied": "the responses have equal rewards, which are no preference",
    "no_contrast": "no response that may be chosen beats one that may be rejected",
    "no_match": "no two responses of nearly equal length",
    "below_min_margin": "the margin is below mine.min_margin",
    "below_quantile": "the margin is below the quantile mine.min_margin_quantile",
}


def mined_rounds(runs: list[StoredRun]) -> list[str]:
    """The names of the rounds that have a mining in any run."""
    return sorted({each.name for run in runs for each in run.rounds if each.mining is not None})


def mining_round(runs: list[StoredRun], name: str, *, draws: bool) -> dict[str, Any]:
    """`figures` and `tables` of one round, and `notes` on what is not drawn.

    Args:
        runs: those that are compared; each that has the round is a series.
        draws: whether plots are drawn.

    Raises:
        LookupError, TypeError, ValueError, AttributeError, ArithmeticError: a mining.json is not as dice writes it.
    """
    mined = [(run.name, each) for run in runs for each in run.rounds if each.name == name and each.mining is not None]
    names = mined_rounds(runs)
    is_drawn = name in names[-max(1, _MOST_ROUNDS // len(runs)) :]
    tables, figures, notes = [_summary(mined)], _gap_curves(mined) if draws else [], []
    if not is_drawn:
        notes.append("Histograms are drawn of the last rounds only, so that the page stays small.")
    whole = []
    for label, each in mined:
        of = f", {label}" if len(runs) > 1 else ""
        tables.append(_dropped(each.mining or {}, of))
        if each.distributions is None:
            continue
        try:
            coarse = len(runs) * len(names) > _FINE_ROUNDS
            drawn = _distributions(each, of, coarse) if draws and is_drawn else []
            tables.append(_variants(each.distributions, of))
            _margins([(label, each)], draws=False)  # fails now, alone, and not later with those of all runs
        except NOT_OURS:
            notes.append(f"{label}: {name}/inspect/distributions.json cannot be shown: it is not as dice writes it.")
            continue
        figures += drawn
        whole.append((label, each))
    return {"name": name, "figures": figures + _margins(whole, draws=draws), "tables": tables, "notes": notes}


def _summary(mined: list[tuple[str, StoredRound]]) -> Table:
    """The rows of mining, a column for each run."""
    columns = [dict(mining_rows(each.mining or {})) for _, each in mined]
    names = list(dict.fromkeys(name for column in columns for name in column))
    lengths = " or ".join(dict.fromkeys(str((each.mining or {})["length"]) for _, each in mined))
    head = ["", *(label for label, _ in mined)] if len(mined) > 1 else ["", ""]
    rows = [[name, *(str(column.get(name, "–")) for column in columns)] for name in names]
    return Table(f"mine (lengths in {lengths})", head, rows)


def _dropped(mining: dict[str, Any], of: str) -> Table:
    """What gave no pair, and why."""
    totals = {"dropped": ("responses", mining["rows"]), "dropped_prompts": ("prompts", mining["prompts"])}
    totals["dropped_pairs"] = ("pairs", mining["pairs"] + sum(mining.get("dropped_pairs", {}).values()))
    rows = [
        [
            f"{what}: {reason.replace('_', ' ')}",
            number(count),
            share(count / total if total else None),
            _REASONS.get(reason, ""),
        ]
        for group, (what, total) in totals.items()
        for reason, count in mining.get(group, {}).items()
        if count
    ]
    nothing = ["nothing", "", "", "every response could be used, and every prompt gave a pair"]
    return Table(f"dropped{of}", ["", "count", "share", "why"], rows or [nothing])


def _variants(found: dict[str, Any], of: str) -> Table:
    head = [
        "settings", "pairs", "prompts with a pair", "α", "mean length gap", "chosen is the longer",
        "correlation of score and length", "pairs in common",
    ]  # fmt: skip
    rows = []
    for place, entry in enumerate(found["variants"]):
        name = entry["variant"] + (" (this mining)" if place == 0 else "")
        if entry["error"] is not None:
            rows.append([name, entry["error"], *[""] * (len(head) - 2)])
            continue
        values = [number(entry[key]) for key in ("pairs", "prompts_with_pair", "alpha", "mean_length_gap")]
        longer, overlap = share(entry["chosen_longer_share"]), share(entry["overlap"])
        rows.append([name, *values, longer, number(entry["reward_length_correlation"]), overlap])
    return Table(f"what other settings of mine.debias would have mined of the same scores{of}", head, rows)


def _curve_steps(mining: dict[str, Any]) -> list[tuple[float, float, bool]]:
    curve = mining["curve"]
    exact = curve.get("exact") or [True] * len(curve["alpha"])  # missing in an older version's curve, which is exact
    points = zip(curve["alpha"], curve["mean_length_gap"], exact, strict=True)
    return [(a, g, e) for a, g, e in points if math.isfinite(a) and math.isfinite(g)]


def _gap_curves(mined: list[tuple[str, StoredRound]]) -> list[Figure]:
    """The falling step function of mean length gap against α, with a dot at the α in use and its interval."""
    rows: list[Row] = []
    told, drawn, is_sampled = [], [], False
    for label, each in mined:
        assert each.mining is not None
        points, alpha = _curve_steps(each.mining), each.mining["alpha"]
        if len(points) < 2:
            continue
        # A few distant break points would flatten the curve near the α in use.
        limit = max(min(points[-1][0], 4 * alpha) if alpha else points[-1][0], 1e-12)
        points = [point for point in points if point[0] <= limit]
        rows += curve_rows(label, points, limit)
        is_sampled |= not all(exact for _, _, exact in points)
        text = f"{label}: from {number(points[0][1])} at α = 0 to {number(points[-1][1])} at {number(limit)}"
        reached = [gap for a, gap, _ in points if alpha is not None and a <= alpha]
        if alpha is not None and reached and alpha <= limit:
            low, high = each.mining.get("alpha_low"), each.mining.get("alpha_high")
            rows.append({"kind": "dot", "series": label, "x": alpha, "y": reached[-1]})
            rows.append(
                {"kind": "band", "series": label, "x": low or 0, "x2": limit if high is None else min(high, limit)}
            )
            text += f"; {number(reached[-1])} at the α in use, {number(alpha)}"
        drawn.append(label)
        told.append(text)
    if not rows:
        return []
    note = "The dot is the α in use; every α in the band picks the same responses."
    note += " Lighter: of a sample of the prompts." if is_sampled else ""
    chart = charts.svg(_curve_chart(drawn), rows, f"Mean length gap against α. {'. '.join(told)}.")
    steps = [row for row in rows if row["kind"] == "line"]
    shown = [[f"{row['x']:.6g}", number(row["y"]), row["series"]] for row in charts.thinned(steps, 12)]
    table = Table("some of its steps", ["from α on", "mean length gap", "run"], shown)
    return [Figure("Length gap of the best and the worst response, |best| − |worst|, against α", chart, note, table)]


def curve_rows(label: str, points: list[tuple[float, float, bool]], limit: float) -> list[Row]:
    """The lines of a curve of steps: consecutive steps of one kind are one line, up to where the next kind begins.

    Args:
        points: α at which a step begins, its gap, and whether that is of all prompts.
        limit: α at which the last step ends.
    """
    rows: list[Row] = []
    segment = 0
    for place, (alpha, gap, exact) in enumerate(points):
        if place and points[place - 1][2] != exact:
            rows.append({**rows[-1], "x": alpha, "y": gap})
            segment += 1
        line = {"kind": "line", "series": label, "segment": f"{label} {segment}", "sampled": not exact}
        rows.append({**line, "x": alpha, "y": gap})
    return [{**row, "place": place} for place, row in enumerate([*rows, {**rows[-1], "x": limit}])]


def _curve_chart(names: list[str]) -> charts.Chart:
    import altair as alt

    x = alt.X(**charts.number_axis("x", "α (reward per unit of length)"))
    y = alt.Y(**charts.number_axis("y", "mean length gap", zero=True))

    def of(kind: str) -> charts.Chart:
        return alt.Chart(charts.data()).transform_filter(f"datum.kind == '{kind}'")

    color = charts.by_series(names, dashed=False)
    opacity = alt.StrokeOpacity("sampled:N", scale=alt.Scale(domain=[False, True], range=[1, 0.45]), legend=None)
    line = of("line").mark_line(interpolate="step-after")
    return alt.layer(
        of("band").mark_rect(opacity=0.25).encode(x=x, x2="x2:Q", **color),
        charts.level(alt.Chart(charts.data()), 0),
        line.encode(x=x, y=y, detail="segment:N", order=alt.Order("place:Q"), strokeOpacity=opacity, **color),
        of("dot").mark_point(size=80, filled=True).encode(x=x, y=y, **color),
    )


def _distributions(each: StoredRound, of: str, coarse: bool) -> list[Figure]:
    """Reward against length, and the lengths of chosen and rejected before and after."""
    found, mining = each.distributions or {}, each.mining or {}
    figures = []
    if found["reward_length"]["counts"]:
        figures.append(_reward_length(found, str(mining["length"]), of, coarse))
    lengths = found["lengths"]
    if not lengths["edges"]:
        return figures
    names = ["chosen", "rejected"]
    most = max(max(lengths[f"{side}_{when}"]["counts"]) for side in names for when in ("before", "after"))
    for when, title in (("before", "Lengths without debiasing"), ("after", "Lengths of the mined pairs")):
        sides = {side: lengths[f"{side}_{when}"] for side in names}
        rows = [
            {**row, "series": side}
            for side, histogram in sides.items()
            for row in charts.steps(lengths["edges"], histogram["counts"])
        ]
        means = ", ".join(f"{side} {number(histogram['mean'])}" for side, histogram in sides.items())
        chart = charts.step_lines(names, f"length in {mining['length']}", "pairs", most)
        picture = charts.svg(chart, rows, f"{title}{of}: outlines of two histograms. Means: {means}.")
        table = _histogram_table(lengths["edges"], {side: item["counts"] for side, item in sides.items()})
        figures.append(Figure(f"{title}{of}", picture, f"Means: {means}.", table))
    return figures


def _histogram_table(edges: list[float], columns: dict[str, list[int]]) -> Table:
    """A histogram as a table of at most ten rows: neighboring bins are added up."""
    bins = len(edges) - 1
    width = -(-bins // 10)
    rows = []
    for first in range(0, bins, width):
        last = min(first + width, bins)
        span = f"{number(edges[first])} to {number(edges[last])}"
        rows.append([span, *(number(sum(counts[first:last])) for counts in columns.values())])
    return Table("numbers, in wider bins", ["from … to below", *columns], rows)


def _reward_length(found: dict[str, Any], unit: str, of: str, coarse: bool) -> Figure:
    import altair as alt

    plane = found["reward_length"]
    xs, ys, counts = plane["length_edges"], plane["reward_edges"], plane["counts"]
    merged = 2 if coarse else 1
    cells: dict[tuple[int, int], int] = {}
    for x, y, count in counts:
        cells[x // merged, y // merged] = cells.get((x // merged, y // merged), 0) + count
    rows: list[Row] = [
        {
            "kind": "cell", "x": xs[x * merged], "x2": xs[min((x + 1) * merged, len(xs) - 1)],
            "y": ys[y * merged], "y2": ys[min((y + 1) * merged, len(ys) - 1)], "count": count,
        }
        for (x, y), count in cells.items()
    ]  # fmt: skip
    box = (xs[0], xs[-1], ys[0], ys[-1])
    names = {"penalty": "equal score", "regression": "least squares"}
    lines = {names.get(line["name"], line["name"]): clipped(line["points"], box) for line in found["lines"]}
    rows += [{"kind": "line", "series": name, "x": x, "y": y} for name, points in lines.items() for x, y in points]
    x_axis = alt.X(**charts.number_axis("x", f"length in {unit}", domain=box[:2]))
    y_axis = alt.Y(**charts.number_axis("y", "reward", domain=box[2:]))
    most = max(2, *cells.values())
    shade = alt.Scale(type="log", domain=[1, most], range=[0.15, 1])
    base = alt.Chart(charts.data())
    picture = alt.layer(
        base.transform_filter("datum.kind == 'cell'")
        .mark_rect(color=charts.SERIES[0])
        .encode(
            x=x_axis, x2="x2:Q", y=y_axis, y2="y2:Q", fillOpacity=alt.FillOpacity("count:Q", scale=shade, legend=None)
        ),
        base.transform_filter("datum.kind == 'line'")
        .mark_line(strokeWidth=2.2)
        .encode(x=x_axis, y=y_axis, **_line_styles(list(lines))),
    )
    slope = found["slope"]
    told = f"{found['usable']:,} usable responses; least squares: {number(slope)} reward per unit of length"
    note = f"Stronger color: more responses, on a log scale up to {most:,}. {told}; {plane['outside']:,} lie outside."
    note += " Bins are twice as wide as the finest, for the size of the page." if coarse else ""
    drawn = charts.svg(picture, rows, f"Reward against length{of}: a histogram in two dimensions. {told}.")
    return Figure(f"Reward against length{of}", drawn, note, _mean_rewards(plane))


def _line_styles(names: list[str]) -> dict[str, Any]:
    import altair as alt

    colors = alt.Scale(domain=names, range=list(charts.SERIES[1 : len(names) + 1]))
    dashes = alt.Scale(domain=names, range=[[1, 0], [5, 3]][: len(names)])
    return {
        "color": alt.Color("series:N", scale=colors, legend=alt.Legend(symbolType="stroke")),
        "strokeDash": alt.StrokeDash("series:N", scale=dashes, legend=alt.Legend(symbolType="stroke")),
        "order": alt.Order("x:Q"),
    }


def clipped(points: list[list[float]], box: tuple[float, float, float, float]) -> list[list[float]]:
    """The part of a line from left to right that lies in a box of (left, right, bottom, top)."""
    left, right, bottom, top = box
    kept: list[list[float]] = []
    for (x, y), (z, w) in itertools.pairwise(points):
        slope = (w - y) / (z - x) if z > x else math.inf
        first, last = max(x, left), min(z, right)
        if math.isfinite(slope) and slope:
            ends = sorted((x + (bottom - y) / slope, x + (top - y) / slope))
            first, last = max(first, ends[0]), min(last, ends[1])
        elif not bottom <= y <= top:
            continue
        if math.isinf(slope):
            kept += [[x, min(max(end, bottom), top)] for end in (y, w)] if left <= x <= right else []
        elif first <= last:
            kept += [[end, y + slope * (end - x)] for end in (first, last)]
    return kept


def _mean_rewards(plane: dict[str, Any]) -> Table:
    """Responses and mean reward by length: the table behind the histogram."""
    xs, ys = plane["length_edges"], plane["reward_edges"]
    width = -(-(len(xs) - 1) // 10)
    sums: dict[int, tuple[int, float]] = {}
    for x, y, count in plane["counts"]:
        so_far, total = sums.get(x // width, (0, 0.0))
        sums[x // width] = (so_far + count, total + count * (ys[y] + ys[y + 1]) / 2)
    rows = [
        [
            f"{number(xs[group * width])} to {number(xs[min((group + 1) * width, len(xs) - 1)])}",
            number(count),
            number(total / count),
        ]
        for group, (count, total) in sorted(sums.items())
    ]
    return Table("numbers, in wider bins", ["length from … to below", "responses", "mean reward (of bins)"], rows)


def _margins(mined: list[tuple[str, StoredRound]], *, draws: bool) -> list[Figure]:
    rows: list[Row] = []
    names, told, tables = [], [], []
    for label, each in mined:
        margins = (each.distributions or {})["margins"]
        if not margins["edges"]:
            continue
        rows += [{**row, "series": label} for row in charts.steps(margins["edges"], margins["counts"])]
        names.append(label)
        told.append(f"{label}: mean {number(margins['mean'])}")
        tables.append(_histogram_table(margins["edges"], {label: margins["counts"]}))
    if not rows or not draws:
        return []
    chart = charts.step_lines(names, "margin (score of chosen − score of rejected)", "pairs")
    picture = charts.svg(chart, rows, f"Margins of the mined pairs: outlines of histograms. {'; '.join(told)}.")
    table = tables[0] if len(tables) == 1 else None
    return [Figure("Margins of the mined pairs", picture, "", table)]
