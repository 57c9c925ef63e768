"""The report in a browser: names, order, contrast and width of the whole page, in light, dark and on a phone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl
import pytest
from inspected_pairs import plain_pairs
from page_checks import page_problems, tab_stops
from reported_runs import reported_run

from dice_py.reporting.html import write_comparison, write_report
from dice_py.storage.parquet import write_parquet

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser

OpenPage = Callable[..., "Page"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs with pairs to read."""
    folders = []
    for number, name in enumerate(("one", "two")):
        folder = reported_run(tmp_path_factory.mktemp("reported") / name, 2 - number, seed=number)
        for place in (1, 2 - number):
            pairs = plain_pairs(8, seed=number).filter(pl.col("round") == place)
            write_parquet(folder / f"round-{place:02d}/inspect/pairs.parquet", pairs, key="k")
        folders.append(folder)
    return folders


@pytest.fixture(scope="module")
def one(runs: list[Path]) -> Path:
    return write_report(runs[0])


LOOKS = [("light", 1300), ("dark", 1300), ("light", 400)]


@pytest.mark.parametrize(("scheme", "width"), LOOKS)
def test_a_report_is_for_all_who_read_it(one: Path, open_page: OpenPage, scheme: str, width: int) -> None:
    page = open_page(one, color_scheme=scheme, viewport={"width": width, "height": 900})
    assert page_problems(page) == []
    page.evaluate("document.querySelectorAll('details').forEach((each) => each.open = true)")
    assert page_problems(page) == []


def test_the_plots_take_the_colors_of_the_page(one: Path, open_page: OpenPage) -> None:
    seen = set()
    for scheme in ("light", "dark"):
        page = open_page(one, color_scheme=scheme)
        colors = page.evaluate("""() => Array.from(document.querySelectorAll("figure svg text"), (text) =>
            getComputedStyle(text).fill)""")
        assert set(colors) == {page.evaluate("getComputedStyle(document.body).color")}
        seen |= set(colors)
        strokes = page.evaluate("""() => Array.from(document.querySelectorAll("figure svg path[stroke^=var]"), (path) =>
            getComputedStyle(path).stroke)""")
        assert strokes
        assert "none" not in strokes  # a color that the page does not name is none
    assert len(seen) == 2


def test_contents_and_pairs(one: Path, open_page: OpenPage) -> None:
    page = open_page(one)
    assert [stop for stop in tab_stops(page) if stop.startswith("a ")][:3] == [
        "a Overview",
        "a Evaluation",
        "a Mining, round-01",
    ]
    page.get_by_role("link", name="Pairs", exact=True).click()
    assert page.locator("#pairs-title").is_visible()
    assert page.locator("#pair-count").inner_text() == "8 of 8 pairs"


def test_several_runs_on_one_page(runs: list[Path], tmp_path: Path, open_page: OpenPage) -> None:
    page = open_page(write_comparison(runs, tmp_path / "both.html"))
    assert page_problems(page) == []
    assert page.locator("#find-run").locator("option").all_inner_texts()[-2:] == ["one", "two"]
