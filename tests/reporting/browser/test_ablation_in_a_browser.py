"""The page of an ablation in a browser: names, order, contrast and width, of few arms and of many."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hostile_texts import HOSTILE
from made_ablations import arms_called, made_results, many_arms
from page_checks import page_problems, tab_stops

from dice_py.reporting.ablation_page import write_ablation_page

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser

OpenPage = Callable[..., "Page"]


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four arms with unfinished runs and a report."""
    folder = tmp_path_factory.mktemp("ablated")
    report = folder / "runs/both/seed-3/report.html"
    report.parent.mkdir(parents=True)
    report.write_text("<!doctype html><html lang='en'><title>the report</title></html>")
    return write_ablation_page(made_results(unfinished=[("both", 7)]), folder / "ablation.html")


@pytest.mark.parametrize(("scheme", "width"), [("light", 1300), ("dark", 1300), ("light", 400)])
def test_it_is_for_all_who_read_it(four: Path, open_page: OpenPage, scheme: str, width: int) -> None:
    page = open_page(four, color_scheme=scheme, viewport={"width": width, "height": 900})
    assert page_problems(page) == []
    page.evaluate("document.querySelectorAll('details').forEach((each) => each.open = true)")
    assert page_problems(page) == []


def test_many_arms(tmp_path: Path, open_page: OpenPage) -> None:
    page = open_page(write_ablation_page(many_arms(), tmp_path / "ablation.html"), color_scheme="dark")
    assert page_problems(page) == []
    strokes = page.evaluate("""() => Array.from(document.querySelectorAll("figure svg path[stroke^=var]"), (path) =>
        getComputedStyle(path).stroke)""")
    assert "none" not in strokes  # a color that the page does not name is none


def test_contents_and_reports(four: Path, open_page: OpenPage) -> None:
    page = open_page(four)
    stops = tab_stops(page)
    assert [stop for stop in stops if stop.startswith("a ")][:3] == ["a What was run", "a Claims", "a By round"]
    page.get_by_role("link", name="report of both, seed 3").click()
    page.wait_for_url("**/runs/both/seed-3/report.html")
    assert page.title() == "the report"


def test_hostile_names(tmp_path: Path, open_page: OpenPage) -> None:
    names = [*list(HOSTILE.values())[:6], "x" * 300, "<script>window.harmed = true</script>"]
    results = made_results((3, 4), 1, arms=arms_called(names), unfinished=[(HOSTILE["html"], 3)])
    for each, text in zip(results["contrasts"], HOSTILE.values(), strict=False):
        each |= {"claim": text, "text": text, "verdict": text}
    page = open_page(write_ablation_page(results, tmp_path / "ablation.html"), viewport={"width": 400, "height": 800})
    assert page_problems(page) == []
    assert page.evaluate("window.harmed") is None
    assert page.locator("img, script, [onerror]").count() == 0
