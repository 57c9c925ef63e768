"""The pair browser in a real browser: list, filters, sorting, difference, credit, keys, links and flags."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import pytest
from inspected_pairs import inspected, many_pairs, plain_pairs, turns

from dice_py.reporting.inspect_page import write_inspect_page

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser

OpenPage = Callable[..., "Page"]
FACTS = [("file", "pairs.jsonl"), ("β", "0.1")]


def rows_in_order() -> list[dict[str, Any]]:
    """The rows as a page lists them first: round by round."""
    return sorted(plain_pairs(24).to_dicts(), key=lambda row: row["round"])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "plain.html"
    return write_inspect_page(plain_pairs(24), out, title="Pairs of pairs.jsonl", facts=FACTS)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "many.html"
    return write_inspect_page(many_pairs(2000), out, title="many", facts=[])


def page_of(rows: list[dict[str, Any]], folder: Path) -> Path:
    return write_inspect_page(inspected(rows), folder / "page.html", title="page", facts=[])


def listed(page: Page) -> list[str]:
    return page.locator("#pair-rows .name").all_inner_texts()


def current(page: Page) -> str:
    selected = page.locator("#pair-rows [aria-selected=true] .name").all_inner_texts()
    name = page.locator("#pair-name").inner_text()
    assert selected in ([name], [])
    return name


def becomes(page: Page, selector: str, text: str) -> None:
    """Waits for a text. The pages' policy forbids Playwright's conditions in JavaScript."""
    page.locator(selector, has_text=re.compile(f"^{re.escape(text)}$")).wait_for()


def hash_becomes(page: Page, key: str) -> None:
    page.wait_for_url(lambda url: url.endswith("#pair=" + key))


# --- the list -----------------------------------------------------------------------------------------------------


def length_gap(row: dict[str, Any]) -> int:
    return int(row["chosen_tokens"]) - int(row["rejected_tokens"])


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


# --- the pair -----------------------------------------------------------------------------------------------------


def facts(page: Page, box: str) -> dict[str, str]:
    names, values = (page.locator(f"{box} {part}").all_inner_texts() for part in ("dt", "dd"))
    return dict(zip(names, values, strict=True))


def shown(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def test_a_pair_says_what_decided_it(plain: Path, open_page: OpenPage) -> None:
    row = plain_pairs(24).row(by_predicate=pl.col("pair_id") == "r02-mined-1", named=True)
    page = open_page(plain, "#pair=r02-mined-1")
    assert page.locator("#pair-prompt .role").all_inner_texts() == ["system", "user"]
    assert page.locator("#pair-prompt .text").all_inner_texts() == [turn["content"] for turn in row["prompt"]]
    assert facts(page, "#pair-facts") == {
        "round": "2",
        "source": "mined",
        "margin": shown(row["margin"]),
        "reward, chosen − rejected": shown(row["chosen_reward"] - row["rejected_reward"]),
        "tokens, chosen − rejected": f"{length_gap(row):+d}".replace("-", "−"),
        "difficulty": "easy",
        "soft_label": "0.75",
    }
    for side in ("chosen", "rejected"):
        (turn,) = row[side]
        assert page.inner_text(f"#{side}-text") == turn["content"]
        assert facts(page, f"#{side}-facts") == {
            "reward": shown(row[f"{side}_reward"]),
            "penalized": shown(row[f"{side}_penalized_reward"]),
            "tokens": str(row[f"{side}_tokens"]),
            "characters": str(len(turn["content"])),
            "finish": "stop",
        }
    cells = [line.locator("td").all_inner_texts() for line in page.locator("#candidate-rows tr").all()]
    assert [line[:7] for line in cells] == [
        [
            str(rank),
            each["role"] or "",
            shown(each["reward"]),
            shown(each["penalized_reward"]),
            str(each["response_tokens"]),
            each["finish_reason"],
            str(each["sample_id"]),
        ]
        for rank, each in enumerate(row["candidates"], 1)
    ]
    for line, candidate in zip(page.locator("#candidate-rows tr").all(), row["candidates"], strict=True):
        line.locator("summary").click()
        assert line.locator("details .text").inner_text() == candidate["response"]


def test_turns_of_a_conversation_keep_their_roles_and_fields(tmp_path: Path, open_page: OpenPage) -> None:
    row = plain_pairs(1).to_dicts()[0]
    call = {"role": "assistant", "content": "", "extra": '{"message":{"tool_calls":[1]}}'}
    row["chosen"] = [call, {"role": "tool", "content": "42", "extra": None}]
    frame = pl.DataFrame([row], schema_overrides={"labels": pl.String})
    page = open_page(write_inspect_page(frame, tmp_path / "page.html", title="page", facts=[]))
    assert page.locator("#chosen-text .role").all_inner_texts() == ["assistant", "further fields", "tool"]
    assert page.locator("#chosen-text .text").all_inner_texts() == ["empty", call["extra"], "42"]


def test_words_that_differ(tmp_path: Path, open_page: OpenPage) -> None:
    row = plain_pairs(1).to_dicts()[0]
    row["chosen"] = turns("assistant", "The cat sat on the mat. 猫は座った")
    row["rejected"] = turns("assistant", "The big dog sat on a mat. 猫は寝た")
    page = open_page(page_of([row], tmp_path))
    assert page.locator("mark").count() == 0
    page.keyboard.press("d")
    assert page.get_attribute("#pair-difference", "aria-pressed") == "true"
    assert page.locator("#chosen-text mark").all_inner_texts() == ["cat", "the", "座っ"]
    assert page.locator("#rejected-text mark").all_inner_texts() == ["big dog", "a", "寝"]
    for side in ("chosen", "rejected"):
        assert page.inner_text(f"#{side}-text") == row[side][0]["content"]
    page.keyboard.press("c")  # one switches the other off
    assert page.locator("mark").count() == 0
    page.keyboard.press("d")
    page.keyboard.press("d")
    assert page.locator("mark, .token").count() == page.locator(".legend .token").count()


def longest_common(a: list[int], b: list[int]) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        before = row[:]
        for j, y in enumerate(b, 1):
            row[j] = before[j - 1] + 1 if x == y else max(before[j], row[j - 1])
    return row[-1]


def test_the_difference_is_the_shortest(plain: Path, open_page: OpenPage) -> None:
    page, rng = open_page(plain), random.Random(0)
    cases = [[[rng.randrange(4) for _ in range(rng.randrange(14))] for _ in range(2)] for _ in range(300)]
    found = page.evaluate("cases => cases.map(([a, b]) => shortestPath(a, b))", cases)
    for (a, b), path in zip(cases, found, strict=True):
        assert path["complete"]
        assert len(path["removed"]) + len(path["added"]) == len(a) + len(b) - 2 * longest_common(a, b)
        kept = [x for i, x in enumerate(a) if i not in path["removed"]]
        assert kept == [y for i, y in enumerate(b) if i not in path["added"]]


def test_the_difference_ends_at_its_bound(tmp_path: Path, open_page: OpenPage) -> None:
    row = plain_pairs(1).to_dicts()[0]
    same = "here they agree "
    for side in ("chosen", "rejected"):
        words = " ".join(f"{side}{i}" for i in range(3000))
        row[side] = turns("assistant", same + words)
    page = open_page(page_of([row], tmp_path))
    page.keyboard.press("d")
    assert "differ in more than 2,000 words" in page.inner_text("#difference-note")
    assert page.inner_text("#chosen-text").startswith(same)
    marks = page.locator("#chosen-text mark").all_inner_texts()
    assert all(text.startswith("chosen") for text in marks)
    found = page.evaluate("""() => {
        const [left, right] = [Array.from({ length: 3000 }, (_, i) => "l" + i % 7 + (i % 2 ? i : "")), []];
        for (let i = 0; i < 3000; i++) right.push(i % 3 ? left[i] : "r" + i);
        right.push(...Array.from({ length: 2500 }, (_, i) => "z" + i));
        const path = shortestPath(left, right);
        const keep = (words, gone, end) => words.slice(0, end).filter((_, i) => !gone.includes(i)).join();
        return [path.complete, path.removed.length + path.added.length, path.x > 500,
                keep(left, path.removed, path.x) === keep(right, path.added, path.y)];
    }""")
    assert found == [False, 2000, True, True]


def test_token_credit(plain: Path, open_page: OpenPage) -> None:
    row = plain_pairs(24).row(by_predicate=pl.col("pair_id") == "r01-mined-4", named=True)
    page = open_page(plain, "#pair=r01-mined-4")
    assert not page.locator("#credit-legend").is_visible()
    page.keyboard.press("c")
    data = json.loads(page.inner_text("#pair-data") or page.evaluate("byId('pair-data').textContent"))
    bounds = data["credit_bounds"]
    assert bounds == sorted(bounds)
    assert page.locator("#credit-legend li").all_inner_texts() == [
        f"≤ −{bounds[3]}",
        *(f"−{bounds[i + 1]} to −{bounds[i]}" for i in (2, 1, 0)),
        f"within ±{bounds[0]}",
        *(f"{bounds[i]} to {bounds[i + 1]}" for i in range(3)),
        f"≥ {bounds[3]}",
    ]
    used = set()
    for side in ("chosen", "rejected"):
        tokens = row[f"{side}_credit"]
        spans = page.locator(f"#{side}-text .token")
        assert spans.all_text_contents() == [token["text"] for token in tokens]
        assert page.inner_text(f"#{side}-text") == row[side][0]["content"]
        classes = spans.evaluate_all("spans => spans.map((span) => span.className.split(' ')[1])")
        for token, name in zip(tokens, classes, strict=True):
            step = sum(abs(token["credit"]) >= bound for bound in bounds)
            assert name == ("zero" if step == 0 else f"{'minus' if token['credit'] < 0 else 'plus'}-{step}")
        used |= set(classes)
        total = shown(sum(token["credit"] for token in tokens))
        assert total == shown(row[f"{side}_reward"])
        assert page.inner_text(f"#{side}-readout") == (
            f"The credits of {len(tokens)} tokens sum to {total}; the reward is {total}."
        )
    assert len(used) > 5
    token = row["chosen_credit"][2]
    words = (
        f'"{token["text"]}", token 3 of {row["chosen_tokens"]}: credit {shown(token["credit"])}, '
        f"log π {shown(token['logp'])}, log π_ref {shown(token['ref_logp'])}"
    )
    page.locator("#chosen-text .token").nth(2).hover()
    assert page.inner_text("#chosen-readout") == words
    page.mouse.move(0, 0)
    assert "sum to" in page.inner_text("#chosen-readout")
    page.focus("#chosen-text .tokens")
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#chosen-readout") == words
    page.keyboard.press("j")
    assert page.get_attribute("#pair-credit", "aria-pressed") == "true"  # it stays on


def test_without_models_there_is_no_credit(tmp_path: Path, open_page: OpenPage) -> None:
    row = plain_pairs(1).to_dicts()[0] | dict.fromkeys(("chosen_credit", "rejected_credit"))
    page = open_page(page_of([row], tmp_path))
    assert not page.locator("#pair-credit").is_visible()
    page.keyboard.press("c")
    assert not page.locator("#credit-legend").is_visible()
    assert page.inner_text("#chosen-text") == row["chosen"][0]["content"]


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


# --- links --------------------------------------------------------------------------------------------------------


def test_links_and_the_way_back(plain: Path, open_page: OpenPage) -> None:
    page = open_page(plain, "#pair=r02-mined-5")
    assert current(page) == "r02-mined-5"
    page.keyboard.press("j")
    page.keyboard.press("j")
    second = current(page)
    hash_becomes(page, second)  # only of the pair at which the reader stays
    page.keyboard.press("k")
    first = current(page)
    hash_becomes(page, first)
    for step, expected in (("go_back", second), ("go_back", "r02-mined-5"), ("go_forward", second)):
        getattr(page, step)()
        becomes(page, "#pair-name", expected)
        assert current(page) == expected
    assert page.get_attribute("#pair-link", "href") == f"#pair={second}"
    page.reload()
    assert current(page) == second


def test_a_link_to_what_is_hidden_or_absent(plain: Path, open_page: OpenPage) -> None:
    page = open_page(plain, "#pair=nothing%3Cb%3E")
    assert page.inner_text("#pair-hidden") == "This page has no pair nothing<b>."
    assert current(page) == listed(page)[0]
    page.select_option("#find-source", "=mined")
    assert not page.locator("#pair-hidden").is_visible()
    page.evaluate("() => { location.hash = '#pair=r02-replay-3'; }")
    becomes(page, "#pair-name", "r02-replay-3")
    assert page.inner_text("#pair-hidden") == "The filters hide this pair."
    page.click("#clear-filters")
    assert not page.locator("#pair-hidden").is_visible()
    assert current(page) == "r02-replay-3"
    page.evaluate("() => { location.hash = '#pair=%E0%A4%A'; }")  # no UTF-8
    becomes(page, "#pair-hidden", "This page has no pair %E0%A4%A.")


def test_a_link_shows_its_pair(plain: Path, open_page: OpenPage) -> None:
    page = open_page(plain, "#pair=r02-mined-5", viewport={"width": 400, "height": 600})
    assert page.locator("#pair-name").bounding_box()["y"] < 600  # type: ignore[index]
    page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    page.keyboard.press("j")
    assert 0 <= page.locator("#pair-name").bounding_box()["y"] < 300  # type: ignore[index]


# --- flags --------------------------------------------------------------------------------------------------------


def test_flags_are_kept_and_exported(plain: Path, open_page: OpenPage, tmp_path: Path) -> None:
    page = open_page(plain, accept_downloads=True, permissions=["clipboard-read", "clipboard-write"])
    ids = listed(page)
    assert page.locator("#flag-download").is_disabled()
    for key in "fjjf":
        page.keyboard.press(key)
    page.keyboard.press("j")
    page.click("#pair-flag")
    page.click("#pair-flag")  # and off again
    assert page.inner_text("#flag-count") == "2 flagged"
    assert page.locator(".row:has(.flag:not(:empty)) .name").all_inner_texts() == [ids[0], ids[2]]
    with page.expect_download() as download:
        page.click("#flag-download")
    assert download.value.suggested_filename == "flagged-pairs.txt"
    download.value.save_as(tmp_path / "flags.txt")
    assert (tmp_path / "flags.txt").read_text() == f"{ids[0]}\n{ids[2]}\n"
    page.click("#flag-copy")
    becomes(page, "#flag-note", "Copied.")
    assert page.evaluate("navigator.clipboard.readText()") == f"{ids[0]}\n{ids[2]}\n"
    page.reload()
    assert page.inner_text("#flag-count") == "2 flagged"
    page.check("#find-flagged")
    assert listed(page) == [ids[0], ids[2]]
    page.keyboard.press("f")  # a flag that goes takes its pair out of the list
    assert listed(page) == [ids[2]]
    assert current(page) == ids[2]
    other = page.context.new_page()  # another window of the same page
    other.goto(f"{plain.as_uri()}#pair={ids[2]}")
    other.keyboard.press("f")
    becomes(page, "#flag-count", "0 flagged")


def test_flags_of_pairs_that_are_gone_are_exported_too(open_page: OpenPage, tmp_path: Path) -> None:
    rows = plain_pairs(4).to_dicts()
    page = open_page(page_of(rows, tmp_path))
    page.keyboard.press("f")
    page.keyboard.press("j")
    page.keyboard.press("f")
    page_of(rows[1:], tmp_path)
    page.reload()
    assert page.inner_text("#flag-count") == "2 flagged, 1 on this page"
    assert page.evaluate("localStorage.length") == 1


NO_STORAGE = "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no'); } })"
NO_CLIPBOARD = "Object.defineProperty(navigator, 'clipboard', { get() { return undefined; } })"


def test_a_browser_that_keeps_nothing(plain: Path, open_page: OpenPage) -> None:
    page = open_page(plain, script=f"{NO_STORAGE};{NO_CLIPBOARD}")
    assert page.inner_text("#flag-note") == "This browser keeps no flags: they end with the page."
    page.keyboard.press("f")
    assert page.inner_text("#flag-count") == "1 flagged"
    page.click("#flag-copy")
    assert "copy the selected text" in page.inner_text("#flag-note")
    assert page.input_value("#flag-text") == listed(page)[0] + "\n"
    assert page.evaluate("getSelection().toString()") == listed(page)[0] + "\n"


def test_a_stored_text_that_is_not_ours(plain: Path, open_page: OpenPage) -> None:
    page = open_page(plain, script="Storage.prototype.getItem = () => '{not json'")
    assert page.inner_text("#flag-count") == "0 flagged"
    assert page.inner_text("#flag-note") == ""
