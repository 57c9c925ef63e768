"""The list of pairs: sorting, filters, rows made as they come into view, and the keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from inspected_pairs import many_pairs, plain_pairs
from pair_pages import current, length_gap, listed, page_of

from dice_py.reporting.inspect_page import write_inspect_page

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser

OpenPage = Callable[..., "Page"]


def rows_in_order() -> list[dict[str, Any]]:
    """The rows as a page lists them first: round by round."""
    return sorted(plain_pairs(24).to_dicts(), key=lambda row: row["round"])


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "many.html"
    return write_inspect_page(many_pairs(2000), out, title="many", facts=[])


# --- the list -----------------------------------------------------------------------------------------------------


def spearman(row: dict[str, Any]) -> float | None:
    """By the definition: Pearson's correlation of ranks, which have no ties here."""
    candidates = row["candidates"]
    if len(candidates) < 3:
        return None

    def ranks(name: str) -> list[int]:
        values = sorted(candidate[name] for candidate in candidates)
        assert len(set(values)) == len(values)
        return [values.index(candidate[name]) for candidate in candidates]

    squares = sum((a - b) ** 2 for a, b in zip(ranks("reward"), ranks("response_tokens"), strict=True))
    n = len(candidates)
    return round(1 - 6 * squares / (n * (n * n - 1)), 4)


SORTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "margin": lambda row: row["margin"],
    "reward_gap": lambda row: row["chosen_reward"] - row["rejected_reward"],
    "chosen_reward": lambda row: row["chosen_reward"],
    "rejected_reward": lambda row: row["rejected_reward"],
    "length_gap": length_gap,
    "length": lambda row: max(row["chosen_tokens"], row["rejected_tokens"]),
    "prompt": lambda row: len("\n".join(turn["content"] for turn in row["prompt"])),
    "correlation": lambda row: None,  # test_correlation_of_reward_and_length
    "round": lambda row: row["round"],
    "source": lambda row: row["source"],
}


IN_EACH_ORDER = """names => Object.fromEntries(names.map((name) => {
    const select = document.getElementById("sort-by");
    const order = document.getElementById("sort-order");
    const ids = () => Array.from(document.querySelectorAll("#pair-rows .name"), (node) => node.textContent);
    const listed = () => [order.textContent, ids()];
    select.value = name;
    select.dispatchEvent(new Event("input", { bubbles: true }));
    const found = [listed()];
    order.click();
    found.push(listed());
    return [name, Object.fromEntries(found)];
}))"""


def test_sorting(plain: Path, open_page: OpenPage) -> None:
    page, rows = open_page(plain), rows_in_order()
    names = page.locator("#sort-by option").evaluate_all("options => options.map((option) => option.value)")
    assert names == ["page", *SORTS]
    found = page.evaluate(IN_EACH_ORDER, names)
    for name, value in SORTS.items():
        known = [row for row in rows if value(row) is not None]
        rest = [row["pair_id"] for row in rows if value(row) is None]  # last in both orders
        # Among equals the order of the page, so a sort that is reversed as a whole is wrong.
        up = sorted(known, key=value)
        values = sorted({value(row) for row in known}, reverse=True)
        down = [row for each in values for row in known if value(row) == each]
        if name != "correlation":  # which has a test of its own
            assert found[name]["Ascending"] == [row["pair_id"] for row in up] + rest, name
            assert found[name]["Descending"] == [row["pair_id"] for row in down] + rest, name
    ids = [row["pair_id"] for row in rows]
    assert found["page"] == {"Ascending": ids, "Descending": ids[::-1]}
    page.select_option("#sort-by", "margin")
    assert page.get_attribute("#sort-order", "aria-pressed") == "true"  # the largest first
    page.select_option("#sort-by", "page")
    assert page.get_attribute("#sort-order", "aria-pressed") == "false"
    assert listed(page) == ids


def test_correlation_of_reward_and_length(tmp_path: Path, open_page: OpenPage) -> None:
    rows = [row for row in plain_pairs(24).to_dicts() if row["candidates"]]
    for row in rows:  # no ties
        for i, candidate in enumerate(row["candidates"]):
            candidate["response_tokens"] = 10 * candidate["response_tokens"] + i
    page = open_page(page_of(rows, tmp_path))
    page.select_option("#sort-by", "correlation")
    by_id = {row["pair_id"]: spearman(row) for row in rows}
    assert len(set(by_id.values())) > 3
    assert [by_id[name] for name in listed(page)] == sorted(by_id.values(), reverse=True)


def test_filters(plain: Path, open_page: OpenPage) -> None:
    page, rows = open_page(plain), rows_in_order()

    def check(keep: Callable[[dict[str, Any]], bool]) -> None:
        expected = [row["pair_id"] for row in rows if keep(row)]
        assert 0 < len(expected) < len(rows)
        assert listed(page) == expected
        assert page.inner_text("#pair-count") == f"{len(expected)} of 24 pairs"
        assert current(page) in expected

    def texts(row: dict[str, Any]) -> str:
        return "\n".join(turn["content"] for side in ("prompt", "chosen", "rejected") for turn in row[side]).lower()

    page.fill("#find-text", "QUESTION 1")
    check(lambda row: "question 1" in texts(row))
    page.fill("#find-text", "stays open")
    check(lambda row: "stays open" in texts(row))
    page.select_option("#find-round", "=2")
    check(lambda row: "stays open" in texts(row) and row["round"] == 2)
    page.click("#clear-filters")
    assert listed(page) == [row["pair_id"] for row in rows]
    assert page.input_value("#find-text") == ""
    page.select_option("#find-source", "=replay")
    check(lambda row: row["source"] == "replay")
    page.select_option("#find-source", "")
    for side, sign in (("chosen", 1), ("rejected", -1)):
        page.select_option("#find-longer", "=" + side)
        check(lambda row, sign=sign: sign * length_gap(row) > 0)
    page.select_option("#find-longer", "")
    lengths = sorted(max(row["chosen_tokens"], row["rejected_tokens"]) for row in rows)
    labels = page.locator("#find-length option").all_inner_texts()[1:]
    assert len(labels) == 4
    counts = []
    for bucket, label in enumerate(labels):
        page.select_option("#find-length", f"={bucket}")
        low, to, *_ = label.split()
        high = int(label.split()[2]) if to == "to" else math.inf
        check(lambda row, low=int(low), high=high: low <= max(row["chosen_tokens"], row["rejected_tokens"]) <= high)
        counts.append(len(listed(page)))
    assert sum(counts) == len(lengths)
    assert max(counts) <= 2 * min(counts)
    assert not page.locator("#find-run-label").is_visible()  # there is one run


def test_no_pair_is_left(plain: Path, open_page: OpenPage) -> None:
    page = open_page(plain)
    shown = current(page)
    page.fill("#find-text", "no pair says this")
    assert listed(page) == []
    assert page.inner_text("#pair-count") == "0 of 24 pairs"
    assert page.inner_text("#pair-hidden") == "The filters hide this pair."
    assert current(page) == shown
    page.keyboard.press("Enter")
    for key in ("j", "k", "f", "Home", "End", "ArrowDown", "Enter"):
        page.keyboard.press(key)
    assert current(page) == shown


def test_what_was_searched_is_marked(plain: Path, open_page: OpenPage) -> None:
    page = open_page(plain)
    page.fill("#find-text", "Question 17")
    assert page.evaluate("Array.from(CSS.highlights.get('found'), String)") == ["Question 17"]
    page.fill("#find-text", "")
    assert page.evaluate("CSS.highlights.get('found').size") == 0


ADDED = """() => {
    window.added = 0;
    const count = (nodes) => Array.from(nodes, (node) => 1 + count(node.childNodes)).reduce((a, b) => a + b, 0);
    new MutationObserver((changes) => changes.forEach((change) => (window.added += count(change.addedNodes))))
        .observe(document.body, { childList: true, subtree: true });
}"""


def test_a_key_makes_as_few_elements_in_2000_pairs_as_in_24(plain: Path, many: Path, open_page: OpenPage) -> None:
    made = {}
    for name, path in (("plain", plain), ("many", many)):
        page = open_page(path)
        page.evaluate(ADDED)
        page.focus("#pair-list")
        for key in ("j", "d", "j", "c", "k", "f", "End", "PageUp", "Home", "d", "j"):
            page.evaluate("window.added = 0")
            page.keyboard.press(key)
            page.evaluate("() => new Promise(requestAnimationFrame)")
            made[name, key] = page.evaluate("window.added")
        assert page.locator("#pair-rows > *").count() <= 50
    assert max(count for (name, _), count in made.items() if name == "many") < 1500, made


def test_a_long_list_is_scrolled_to(many: Path, open_page: OpenPage) -> None:
    page = open_page(many)
    ids = page.evaluate("JSON.parse(document.getElementById('pair-data').textContent).pairs.map((pair) => pair.key)")
    assert len(set(ids)) == 2000
    page.focus("#pair-list")
    page.keyboard.press("End")
    assert (current(page), listed(page)[-1]) == (ids[-1], ids[-1])
    assert page.inner_text("#pair-place") == "2,000 of 2,000"
    row = page.locator("#pair-rows [aria-selected=true]")
    assert (row.get_attribute("aria-posinset"), row.get_attribute("aria-setsize")) == ("2000", "2000")
    assert page.get_attribute("#pair-list", "aria-activedescendant") == row.get_attribute("id")
    box, inside = page.locator("#pair-list").bounding_box(), row.bounding_box()
    assert box is not None
    assert inside is not None
    assert box["y"] <= inside["y"]
    assert inside["y"] + inside["height"] <= box["y"] + box["height"] + 2
    page.evaluate("document.getElementById('pair-list').scrollTop = 600 * 51.2")
    page.locator(".row", has_text=ids[600]).wait_for()
    assert not page.get_attribute("#pair-list", "aria-activedescendant")
    page.locator("#pair-rows .row").nth(15).click()
    assert current(page) in ids[550:700]
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    assert current(page) == ids[1]


# --- keys ---------------------------------------------------------------------------------------------------------


def test_keys(plain: Path, open_page: OpenPage) -> None:
    page = open_page(plain)
    ids = listed(page)
    seen = []
    for key in "jjjkk":
        page.keyboard.press(key)
        seen.append(ids.index(current(page)))
    assert seen == [1, 2, 3, 2, 1]
    for _ in range(30):
        page.keyboard.press("k")
    assert current(page) == ids[0]
    assert page.locator("#pair-previous").is_disabled()
    page.click("#pair-next")
    page.click("#pair-next")
    page.click("#pair-previous")
    assert current(page) == ids[1]
    page.keyboard.press("Control+j")
    page.keyboard.press("Alt+k")
    assert current(page) == ids[1]


def focused(page: Page) -> str:
    return str(page.evaluate("document.activeElement.id || document.activeElement.nodeName"))


def test_keys_of_the_field(plain: Path, open_page: OpenPage) -> None:
    page = open_page(plain)
    before = current(page)
    page.keyboard.press("/")
    assert focused(page) == "find-text"
    page.keyboard.type("jkdcf?/")
    assert page.input_value("#find-text") == "jkdcf?/"
    assert not page.locator("#pair-help").is_visible()
    assert page.inner_text("#flag-count") == "0 flagged"
    assert page.get_attribute("#pair-difference", "aria-pressed") == "false"
    page.fill("#find-text", "")
    assert current(page) == before
    page.keyboard.type("open")
    page.keyboard.press("Enter")
    assert focused(page) == "pair-list"
    page.keyboard.press("Enter")
    assert focused(page) == "pair"
    page.keyboard.press("Escape")
    assert focused(page) == "pair-list"
    page.keyboard.press("/")
    page.keyboard.press("Escape")
    assert focused(page) == "pair-list"
    assert page.input_value("#find-text") == "open"
    page.focus("#find-round")
    page.keyboard.press("j")
    assert page.locator("#pair-place").inner_text().startswith("1 of")


def test_help_and_keys_that_are_off(plain: Path, open_page: OpenPage) -> None:
    page = open_page(plain)
    first = current(page)
    page.keyboard.press("?")
    dialog = page.locator("#pair-help")
    assert dialog.is_visible()
    assert {"j", "k", "/", "?", "d", "c", "f"} <= set(dialog.locator("kbd").all_inner_texts())
    page.keyboard.press("j")  # nothing happens behind it
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    assert current(page) == first
    page.click("#open-help")
    page.uncheck("#keys-on")
    page.keyboard.press("Escape")
    assert focused(page) == "open-help"
    page.keyboard.press("j")
    page.keyboard.press("?")
    assert current(page) == first
    assert not dialog.is_visible()
    page.reload()
    page.keyboard.press("j")
    assert current(page) == first  # it is kept
    page.click("#open-help")
    page.check("#keys-on")
    page.click("#pair-help button")
    page.keyboard.press("j")
    assert current(page) != first
