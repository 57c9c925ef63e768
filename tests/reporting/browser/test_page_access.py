"""The pages for all who read them: names, order, contrast and focus, in both themes, on paper, and 400 px wide."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from inspected_pairs import hostile_pairs, plain_pairs
from page_checks import page_problems, tab_stops

from dice_py.reporting.inspect_page import write_inspect_page

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser

OpenPage = Callable[..., "Page"]
NARROW = {"width": 400, "height": 800}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_view_of_the_pair_browser(plain: Path, open_page: OpenPage, scheme: str) -> None:
    page = open_page(plain, color_scheme=scheme)

    def check() -> None:
        for width in (1300, 1000, 400):
            page.set_viewport_size({"width": width, "height": 800})
            assert page_problems(page) == []

    check()
    page.locator("#candidate-rows summary").first.click()
    page.keyboard.press("d")
    page.keyboard.press("f")
    page.fill("#find-text", "the")
    check()
    page.fill("#find-text", "no pair says this")
    page.keyboard.press("Enter")
    page.keyboard.press("c")
    used = page.locator(".token").evaluate_all("all => all.map((token) => token.className.split(' ')[1])")
    assert len(set(used)) == 9  # every color, if only in the legend
    check()
    page.keyboard.press("?")
    check()


def test_themes_differ(plain: Path, open_page: OpenPage) -> None:
    page = open_page(plain, color_scheme="light")
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.emulate_media(color_scheme="dark")
    assert light == "rgb(255, 255, 255)"
    assert page.evaluate(ground) != light


def test_hostile_texts_break_no_layout(tmp_path: Path, open_page: OpenPage) -> None:
    frame = hostile_pairs()
    out = write_inspect_page(frame, tmp_path / "hostile.html", title="hostile", facts=[("policy", "x" * 500)])
    page = open_page(out, viewport=NARROW)
    for key in ("d", "c"):
        page.keyboard.press(key)
        assert page_problems(page) == []
    page.evaluate("hash => { location.hash = hash; }", f"#pair={frame['pair_id'][-1]}")
    page.locator("#pair-name", has_text=frame["pair_id"][-1]).wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_everything_is_reached_by_tab_in_the_order_of_the_page(plain: Path, open_page: OpenPage) -> None:
    page = open_page(plain)
    page.keyboard.press("j")
    page.keyboard.press("f")
    page.keyboard.press("c")
    stops = tab_stops(page)
    controls = page.locator(
        "button:visible:enabled, a:visible, input:visible, select:visible, summary:visible, [tabindex='0']:visible"
    ).evaluate_all("all => all.map((node) => node.id).filter(Boolean)")
    assert [stop.split("#")[1] for stop in stops if "#" in stop] == controls
    assert len([stop for stop in stops if stop.startswith("summary")]) == page.locator("summary").count()


def test_where_things_are(plain: Path, open_page: OpenPage) -> None:
    page = open_page(plain)

    def left_and_top(selector: str) -> tuple[float, float]:
        box = page.locator(selector).bounding_box()
        assert box is not None
        return box["x"], box["y"]

    (list_x, _), (pair_x, _) = left_and_top("#pair-list"), left_and_top("#pair")
    (chosen_x, chosen_y), (rejected_x, rejected_y) = left_and_top(".side.chosen"), left_and_top(".side.rejected")
    assert list_x + 200 < pair_x < chosen_x + 2 < rejected_x
    assert chosen_y == rejected_y
    page.set_viewport_size(NARROW)  # type: ignore[arg-type]
    (_, list_y), (_, pair_y) = left_and_top("#pair-list"), left_and_top("#pair")
    (chosen_x, chosen_y), (rejected_x, rejected_y) = left_and_top(".side.chosen"), left_and_top(".side.rejected")
    assert list_y < pair_y < chosen_y < rejected_y
    assert chosen_x == rejected_x


def test_paper_has_the_pair_and_no_controls(plain: Path, open_page: OpenPage) -> None:
    page = open_page(plain, color_scheme="dark")
    page.keyboard.press("c")
    page.emulate_media(media="print", color_scheme="light")
    for name in ("pair-name", "pair-prompt", "chosen-text", "rejected-text", "credit-legend", "candidate-rows"):
        assert page.locator(f"#{name}").is_visible(), name
    assert page.locator("button:visible, select:visible, input:visible, #pair-list:visible").count() == 0
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page_problems(page) == []
    assert page.pdf().startswith(b"%PDF")


def test_without_javascript_the_page_says_so(plain: Path, open_page: OpenPage) -> None:
    page = open_page(plain, java_script_enabled=False)
    assert page.locator("noscript").inner_text() == "The pair browser needs JavaScript, which is off."
    assert not page.locator("#pair-browser").is_visible()


def test_no_pairs(tmp_path: Path, open_page: OpenPage) -> None:
    page = open_page(write_inspect_page(plain_pairs(0), tmp_path / "page.html", title="none", facts=[]))
    assert page.inner_text("#pairs") == "Pairs\n\nThere is no pair to show."
    page.keyboard.press("j")
    assert page_problems(page) == []


FAULTS = {
    "the document has no title": "<main><h1>x</h1></main>",
    "the document has not one h1": "<main></main>",
    "the document has not one main": "<h1>x</h1>",
    "h3: a level is left out above": "<h1>x</h1><h3>y</h3>",
    "#a is there twice": "<p id=a></p><p id=a></p>",
    "button: has no name": "<button></button>",
    "input: has no name": "<label>x</label><input>",
    "svg: has no name": "<svg role=img><path d='M0 0'/></svg>",
    "th: has no scope": "<table><caption>c</caption><tr><th>x</th></tr></table>",
    "table: has no caption": "<table><tr><td>x</td></tr></table>",
    "p: aria-labelledby leads nowhere": "<p aria-labelledby=none>x</p>",
    "p: positive tabindex": "<p tabindex=3>x</p>",
    "p: contrast 2.32": "<p style='color: #aaa'>x</p>",
    "p: contrast 3.07": "<div style='background: #ddd'><p style='color: #777; opacity: .95'>x</p></div>",
    "select: contrast 1.61 of the border": "<label>x<select style='border: 1px solid #ccc'></select></label>",
    "div: scrolls, but not by the keyboard": "<div style='overflow:auto; width: 9px'><p style='width: 99px'></p></div>",
    "p: has a script of its own": "<p onclick='void 0'>x</p>",
    "iframe: leads out of the page": "<iframe src='about:blank' title=x></iframe>",
    "the page is 3000 px wide": "<p style='width: 3000px; margin: 0'>x</p>",
    "ul.x: not of a list": "<ul><ul class=x></ul></ul>",
}


def test_the_checks_find_what_they_look_for(tmp_path: Path, open_page: OpenPage) -> None:
    (tmp_path / "page.html").write_text("<!doctype html><title>x</title><body style='margin: 0'>")
    page = open_page(tmp_path / "page.html")
    for fault, html in FAULTS.items():
        page.evaluate("html => { document.body.innerHTML = html; }", html)
        page.evaluate("title => { document.title = title; }", "" if "title" in fault else "x")
        assert fault in page_problems(page)
    assert "the document has no language" in page_problems(page)


def test_a_focus_that_is_not_seen_is_found(tmp_path: Path, open_page: OpenPage) -> None:
    (tmp_path / "page.html").write_text("<!doctype html><button>one</button><button style='outline: none'>two</button>")
    with pytest.raises(AssertionError, match=r"\['button two'\]"):
        tab_stops(open_page(tmp_path / "page.html"))
