"""Plots as static SVG: Vega-Lite charts by Altair, drawn by vl-convert. No plotting script is in the page.

A plot has no color of its own but those of the page (style.css), so it serves dark, light and print. To a screen reader
it is one picture with a text alternative: the parts of the plot say nothing.
"""

from __future__ import annotations

import functools
import html
import importlib.util
import itertools
import json
import resource
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeAlias

from dice_py.config.extras import install
from dice_py.reporting.foreign_text import visible

if TYPE_CHECKING:
    from markupsafe import Markup

WIDTH, HEIGHT = 330, 190
SERIES = tuple(f"var(--series-{number})" for number in range(1, 9))
"""The colors of series, which style.css names; a page has no more series than these."""
_DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3])
_FONT = "system-ui, sans-serif"
_DATA = "rows"
_LIBRARIES = ("altair", "vl_convert")
"""That an installation by hand may lack."""
_ADDRESS_SPACE = 128 * 2**30
"""Bytes that the JavaScript engine of vl-convert reserves, and more: with less it ends the process."""

Row = dict[str, Any]
Chart: TypeAlias = Any
"""A chart of Altair, whose stubs give a layer of charts many types."""


def cannot_draw() -> str | None:
    """Why this process cannot draw plots; None if it can."""
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        return (
            f"plots are left out, since {' and '.join(missing)} cannot be imported: `{install('train')}`, and "
            "`dice report` draws them. The tables have their numbers"
        )
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY or limit >= _ADDRESS_SPACE:
        return None
    return (
        f"plots are left out: drawing them reserves {_ADDRESS_SPACE >> 30} GiB of addresses, and this process may have "
        f"{limit >> 30} GiB (ulimit -v). The tables have their numbers; `dice report` without the limit draws them"
    )


def unchecked() -> AbstractContextManager[None]:
    """Altair compares no chart with Vega-Lite's schema meanwhile, which takes longer than drawing it: the tests do."""
    from altair.utils import schemapi

    return schemapi.debug_mode(False)


def svg(chart: Chart, rows: Sequence[Row], description: str) -> Markup:
    """Draws a chart of `data()`.

    Args:
        rows: its data; texts in it are shown as `visible` does.
        description: the text alternative: what is shown, and what to see in it.
    """
    from altair.utils import schemapi
    from markupsafe import Markup

    spec = chart.to_dict(validate=schemapi.DEBUG_MODE) | {
        "datasets": {_DATA: [_shown(row) for row in rows]},
        "config": _config(),
    }
    drawn = _drawn(json.dumps(spec, allow_nan=False))
    label = html.escape(visible(description))
    return Markup(drawn.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))


def data() -> Any:
    """The rows that `svg` gets. They are not in the chart, since Altair would check each against its schema."""
    import altair as alt

    return alt.NamedData(_DATA)


def _shown(row: Row) -> Row:
    return {name: visible(value) if isinstance(value, str) else value for name, value in row.items()}


@functools.lru_cache(maxsize=512)
def _drawn(spec: str) -> str:
    """The SVG of a chart. A report after round 20 draws what is new since round 19."""
    import vl_convert

    text: str = vl_convert.vegalite_to_svg(spec)
    # As parts of a picture they say nothing, and they are a fifth of its size.
    for part in (' role="graphics-object" aria-roledescription="group mark container"', ' pointer-events="none"'):
        text = text.replace(part, "")
    return text


def _config() -> dict[str, Any]:
    """The look of all plots."""
    quiet = {
        "labelColor": "currentColor",
        "titleColor": "currentColor",
        "labelFont": _FONT,
        "titleFont": _FONT,
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
    }
    lines = {"gridColor": "var(--line)", "domainColor": "var(--muted)", "tickColor": "var(--muted)"}
    return {
        "aria": False,
        "background": "transparent",
        "font": _FONT,
        "padding": 5,
        "view": {"stroke": None, "continuousWidth": WIDTH, "continuousHeight": HEIGHT, "discreteWidth": WIDTH},
        "axis": quiet | lines | {"labelLimit": 160, "gridOpacity": 0.6},
        "legend": quiet | {"orient": "top", "title": None, "symbolStrokeWidth": 2.5, "labelLimit": 260, "columns": 3},
        "line": {"strokeWidth": 1.8, "color": SERIES[0]},
        "point": {"filled": True, "size": 34, "color": SERIES[0]},
        "rule": {"color": "var(--muted)"},
    }


def by_series(names: Sequence[str], *, dashed: bool = True) -> dict[str, Any]:
    """The encoding of `series`: a color and, for print, a dash for each name. One series needs no legend."""
    import altair as alt

    domain = [visible(name) for name in names]
    several = len(domain) > 1
    legend: Any = alt.Legend(symbolType="stroke", symbolOpacity=1) if several else None
    colors = alt.Scale(domain=domain, range=list(SERIES[: len(domain)]))
    encoding: dict[str, Any] = {"color": alt.Color("series:N", scale=colors, legend=legend)}
    if dashed and several:
        dashes = list(itertools.islice(itertools.cycle(_DASHES), len(domain)))
        encoding["strokeDash"] = alt.StrokeDash("series:N", scale=alt.Scale(domain=domain, range=dashes), legend=legend)
    return encoding


def number_axis(
    field: str, title: str, *, zero: bool = False, whole: bool = False, domain: Sequence[float] | None = None
) -> dict[str, Any]:
    """Arguments of an x or y channel of numbers."""
    import altair as alt

    limits: dict[str, Any] = {} if domain is None else {"domain": list(domain)}
    scale = alt.Scale(zero=zero, nice=domain is None, **limits)
    ticks: dict[str, Any] = {"tickCount": 5} | ({"tickMinStep": 1} if whole else {})
    return {"shorthand": f"{field}:Q", "title": title, "scale": scale, "axis": alt.Axis(**ticks)}


def level(chart: Chart, value: float, **mark: Any) -> Chart:
    """A line across a chart at a value of y, drawn once and not for each row."""
    import altair as alt

    return chart.transform_aggregate(count="count()").mark_rule(**mark).encode(y=alt.datum(value))


def steps(edges: Sequence[float], counts: Sequence[float]) -> list[Row]:
    """The outline of a histogram as rows of `x`, `y` and `place`, for a line of the interpolation "step-after"."""
    if not counts:
        return []
    corners = [(edges[0], 0), *zip(edges, counts, strict=False), (edges[-1], 0)]
    return [{"x": x, "y": y, "place": place} for place, (x, y) in enumerate(corners)]


def thinned(rows: Sequence[Row], most: int) -> list[Row]:
    """Every k-th row and the last, `most` and one at most."""
    every = -(-len(rows) // most) if most else 1
    if every <= 1:
        return list(rows)
    return [*rows[:-1:every], rows[-1]]


def step_lines(names: Sequence[str], x_title: str, y_title: str, most: float | None = None) -> Chart:
    """Outlines of histograms: rows of `steps`, each with its `series`.

    Args:
        most: where the axis of y ends, so that pictures beside each other have one scale.
    """
    import altair as alt

    y: dict[str, Any] = {} if most is None else {"domain": [0, most]}
    return (
        alt.Chart(data())
        .mark_line(interpolate="step-after")
        .encode(
            x=alt.X(**number_axis("x", x_title)),
            y=alt.Y(**number_axis("y", y_title, zero=True, whole=True, **y)),
            order=alt.Order("place:Q"),
            **by_series(names),
        )
    )
