"""The rows that plots are drawn of, and the SVG that comes of them."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from hostile_texts import HOSTILE, obeyed

from dice_py.reporting import charts
from dice_py.reporting.foreign_text import visible
from dice_py.reporting.formatting import number, quantiles, share
from dice_py.reporting.render import PAGE
from dice_py.reporting.sections.mining import clipped, curve_rows

ALPHAS, GAPS = [0.0, 1.0, 2.0, 3.0], [6.0, 3.0, 0.0, -3.0]
SVG = "{http://www.w3.org/2000/svg}"


def lines(exact: list[bool]) -> dict[tuple[str, bool], list[tuple[float, float]]]:
    """The corners of each line of the curve, by its name and whether it is of a sample."""
    found: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    for row in curve_rows("run", list(zip(ALPHAS, GAPS, exact, strict=True)), 4.0):
        found.setdefault((row["segment"], row["sampled"]), []).append((row["x"], row["y"]))
    return found


def test_an_exact_curve_is_one_line() -> None:
    (line,) = lines([True] * 4).values()
    assert line == [*zip(ALPHAS, GAPS, strict=True), (4.0, -3.0)]


def test_what_is_of_a_sample_is_a_line_of_its_own() -> None:
    found = lines([False, True, True, False])
    assert [sampled for _, sampled in found] == [True, False, True]
    first, middle, last = found.values()
    # They meet, and together they are the one line.
    assert first[-1] == middle[0]
    assert middle[-1] == last[0]
    (whole,) = lines([True] * 4).values()
    assert [*first, *middle[1:], *last[1:]] == whole


def test_the_outline_of_a_histogram() -> None:
    rows = charts.steps([1, 3, 5], [7, 2])
    assert [(row["x"], row["y"]) for row in rows] == [(1, 0), (1, 7), (3, 2), (5, 0)]
    assert [row["place"] for row in rows] == [0, 1, 2, 3]
    assert charts.steps([], []) == []


@pytest.mark.parametrize(
    ("count", "most", "every"), [(10, 10, 1), (10, 20, 1), (11, 10, 2), (1000, 20, 50), (41, 20, 3)]
)
def test_thinning_keeps_every_kth_and_the_last(count: int, most: int, every: int) -> None:
    rows = [{"x": n} for n in range(count)]
    kept = [row["x"] for row in charts.thinned(rows, most)]
    assert kept == sorted({*range(0, count - 1, every), count - 1})
    assert len(kept) <= most + 1


BOX = (0.0, 10.0, 0.0, 5.0)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([[0, 1], [10, 4]], [[0, 1], [10, 4]]),
        ([[-10, 0], [20, 3]], [[0, 1], [10, 2]]),
        ([[0, -5], [10, 15]], [[2.5, 0], [5, 5]]),
        ([[0, 15], [10, -5]], [[5, 5], [7.5, 0]]),
        ([[0, 2], [10, 2]], [[0, 2], [10, 2]]),
        ([[0, 7], [10, 7]], []),
        ([[11, 1], [12, 2]], []),
        ([[0, 1], [4, 1], [4, 9], [8, 9]], [[0, 1], [4, 1], [4, 1], [4, 5]]),
    ],
)
def test_a_line_ends_at_the_edge_of_its_picture(points: list[list[float]], expected: list[list[float]]) -> None:
    assert clipped(points, BOX) == [pytest.approx(point) for point in expected]


def test_a_plot_is_one_picture_without_style_script_or_address() -> None:
    names = [HOSTILE["html"], HOSTILE["attribute"], HOSTILE["escape"], HOSTILE["surrogate"], "\0"]
    rows = [{**row, "series": name} for name in names for row in charts.steps([0, 1, 2], [3, 4])]
    drawn = str(charts.svg(charts.step_lines(names, "x", "pairs"), rows, f"all of {names[1]} and {names[2]}"))
    assert obeyed(drawn) == []
    root = ElementTree.fromstring(drawn)
    assert root.tag == f"{SVG}svg"
    assert (root.get("role"), root.get("aria-label")) == ("img", visible(f"all of {names[1]} and {names[2]}"))
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= {"svg", "g", "path", "line", "text", "rect"}
    names_of_attributes = {name for element in root.iter() for name in element.attrib}
    assert not {name for name in names_of_attributes if name.startswith("on") or name in ("style", "href", "id")}
    labels = {"".join(text.itertext()) for text in root.iter(f"{SVG}text")}
    assert {visible(name) for name in names} <= labels
    colors = {element.get("stroke") for element in root.iter() if element.get("stroke")}
    assert set(charts.SERIES[:5]) <= colors
    assert all(
        color == "none" or color.startswith(("var(--", "currentColor", "transparent")) for color in colors if color
    )


def test_the_page_names_the_colors_of_all_series() -> None:
    style = (PAGE / "style.css").read_text(encoding="utf-8")
    assert [
        color for color in charts.SERIES if f"{color.removeprefix('var(').removesuffix(')')}: light-dark(" not in style
    ] == []


def test_numbers_as_a_person_reads_them() -> None:
    assert number({"truncated": 3, "duplicate": 0}) == "truncated 3"
    assert number({"duplicate": 0}) == "none"
    assert number({"share": 0.0, "drawn": 0}) == "share 0"
    assert (share(0.5), share(None)) == ("50.0 %", "–")
    assert quantiles({"min": 0.0, "0.05": 0.25, "max": 2.0}) == "min: 0, 5 %: 0.25, max: 2"
    assert quantiles({"min": None, "max": None}) == "–"
