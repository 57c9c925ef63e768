"""`report.html`: what it says of mining, and the curve of mean length gap against α."""

from __future__ import annotations

import re
from pathlib import Path

import polars as pl
import pytest

from dice_py import mine_pairs
from dice_py.reporting.charts import gap_curve_svg
from dice_py.reporting.formatting import mining_rows, number, quantiles, share
from dice_py.reporting.html import write_report
from dice_py.storage.files import Manifest, read_json, write_json

LEFT, RIGHT = 70.0, 620.0
"""Where the axis of α begins and ends, in the picture's own units."""

Path_ = list[tuple[float, float]]


def drawn(svg: str) -> dict[str, list[Path_]]:
    """Of each class of paths their corners, one list for each unbroken line."""
    found: dict[str, list[Path_]] = {}
    for name, text in re.findall(r'<path class="([^"]*)" d="([^"]*)"/>', svg):
        lines: list[Path_] = []
        for kind, value in re.findall(r"([MHV])([-\d.,]+)", text):
            if kind == "M":
                x, y = map(float, value.split(","))
                lines.append([(x, y)])
            else:
                x, y = lines[-1][-1]
                lines[-1].append((float(value), y) if kind == "H" else (x, float(value)))
        found[name] = lines
    return found


def dot(svg: str) -> tuple[float, float] | None:
    """The α that is marked."""
    found = re.search(r'<circle class="chosen" cx="([\d.]+)" cy="([\d.]+)"', svg)
    return None if found is None else (float(found[1]), float(found[2]))


ALPHAS, GAPS = [0.0, 1.0, 2.0, 3.0], [6.0, 3.0, 0.0, -3.0]


def test_an_exact_curve_is_one_line() -> None:
    lines = drawn(gap_curve_svg(ALPHAS, GAPS, 2.5, [True] * 4))
    assert list(lines) == ["curve"]
    (line,) = lines["curve"]
    xs, ys = zip(*line, strict=True)
    assert (xs[0], xs[-1]) == (LEFT, RIGHT)
    assert list(xs) == sorted(xs)
    assert list(ys) == sorted(ys)  # downwards, as the gap falls
    assert len(set(ys)) == 4
    assert lines == drawn(gap_curve_svg(ALPHAS, GAPS, 2.5))


def test_what_is_of_a_sample_is_lighter() -> None:
    exact = drawn(gap_curve_svg(ALPHAS, GAPS, 2.5, [True] * 4))["curve"][0]
    lines = drawn(gap_curve_svg(ALPHAS, GAPS, 2.5, [False, True, True, False]))
    assert list(lines) == ["curve", "curve sampled"]
    assert len(lines["curve"]) == 1
    assert len(lines["curve sampled"]) == 2
    # The pieces are those of the one line, and meet.
    first, last = lines["curve sampled"]
    assert first[-1] == lines["curve"][0][0]
    assert lines["curve"][0][-1] == last[0]
    assert [*first, *lines["curve"][0][1:], *last[1:]] == exact


@pytest.mark.parametrize(("alpha", "step"), [(0.0, 0), (1.0, 1), (1.5, 1), (2.999, 2)])
def test_the_dot_is_on_the_curve(alpha: float, step: int) -> None:
    svg = gap_curve_svg(ALPHAS, GAPS, alpha, [True] * 4)
    found = dot(svg)
    assert found is not None
    limit = 4 * alpha if 0 < 4 * alpha < 3.0 else 3.0
    assert found[0] == pytest.approx(LEFT + alpha / limit * (RIGHT - LEFT), abs=0.06)
    levels = sorted({y for _, y in drawn(svg)["curve"][0]})
    assert found[1] == levels[step]


def test_no_dot_and_no_curve() -> None:
    assert dot(gap_curve_svg(ALPHAS, GAPS, None)) is None
    assert dot(gap_curve_svg([1.0, 2.0], [1.0, 0.0], 0.5)) is None  # before the first step that is known
    assert "there is no curve to draw" in gap_curve_svg([0.0], [1.0], 0.0)


def test_numbers_as_a_person_reads_them() -> None:
    assert number({"truncated": 3, "duplicate": 0}) == "truncated 3"
    assert number({"duplicate": 0}) == "none"
    assert number({"share": 0.0, "drawn": 0}) == "share 0"
    assert (share(0.5), share(None)) == ("50.0 %", "–")
    assert quantiles({"min": 0.0, "0.05": 0.25, "max": 2.0}) == "min: 0, 5 %: 0.25, max: 2"
    assert quantiles({"min": None, "max": None}) == "–"


def scored() -> pl.DataFrame:
    rows = [(p, r, 0.1 * ((7 * p + 3 * r) % 10) + 0.05 * (5 + r), 5 + r) for p in range(40) for r in range(4)]
    return pl.DataFrame(rows, schema=["prompt_id", "sample_id", "reward", "response_tokens"], orient="row")


def test_the_report_of_a_round(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path / "manifest.json")
    manifest.data |= {"policy": {"folder": "p"}, "reference": {"folder": "r"}}
    manifest.record("round-01/mine", status="done", seconds=1.0, counts={})
    mined = mine_pairs(scored(), min_margin=0.8)
    curve = mined.curve.to_dict(as_series=False)
    assert len(curve["alpha"]) > 2
    found = {
        "length": "tokens",
        "debias": "linear",
        "pairing": "max_min",
        "pooled_rounds": [1, 2, 3],
        **mined.summary(),
    }
    write_json(tmp_path / "round-01/mine/mining.json", {**found, "curve": curve})
    page = write_report(tmp_path).read_text()
    for name, value in mining_rows(found):
        assert f"<th>{name}</th><td>{value}</td>" in page
    names = [name for name, _ in mining_rows(found)]
    assert names == [
        "pairs", "debias", "pairing", "candidates of rounds", "alpha", "mean length gap",
        "correlation of reward and length", "chosen is the longer", "margins", "dropped pairs",
    ]  # fmt: skip
    assert "<td>1 to 3</td>" in page
    assert 'class="curve"' in page
    assert "of a sample" not in page
    assert dot(page) is not None

    sampled = {**curve, "exact": [False] * len(curve["alpha"])}
    write_json(tmp_path / "round-01/mine/mining.json", {**found, "curve": sampled})
    page = write_report(tmp_path).read_text()
    assert "Lighter: of a sample of the prompts." in page
    assert 'class="curve"' not in page


def test_the_report_of_what_an_older_version_mined(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path / "manifest.json")
    manifest.data |= {"policy": {"folder": "p"}, "reference": {"folder": "r"}}
    manifest.record("round-01/mine", status="done", seconds=1.0, counts={})
    mined = mine_pairs(scored())
    known = (
        "pairs", "alpha", "alpha_low", "alpha_high", "mean_length_gap_before", "mean_length_gap_after", "dropped",
        "dropped_prompts", "prompts", "rows",
    )  # fmt: skip
    found = {name: value for name, value in mined.summary().items() if name in known}
    curve = mined.curve.drop("exact").to_dict(as_series=False)
    write_json(tmp_path / "round-01/mine/mining.json", {"length": "tokens", **found, "curve": curve})
    page = write_report(tmp_path).read_text()
    assert "mean length gap" in page
    assert "correlation" not in page
    assert 'class="curve"' in page
    assert read_json(tmp_path / "manifest.json")["stages"]
