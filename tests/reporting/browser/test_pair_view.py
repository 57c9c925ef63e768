"""The pair that is shown: what decided it, words that differ, token credit, its link and its flag."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl
import pytest
from inspected_pairs import plain_pairs, turns
from pair_pages import becomes, current, hash_becomes, length_gap, listed, page_of

from dice_py.reporting.inspect_page import write_inspect_page

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser

OpenPage = Callable[..., "Page"]


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


MOVES_AS_THE_ADDRESS_FOLLOWS = """() => {
    const real = window.setTimeout;
    let follow;
    window.setTimeout = (work) => { follow = work; return 0; };
    const press = () => document.body.dispatchEvent(new KeyboardEvent("keydown", {key: "j", bubbles: true}));
    press(); follow(); press();
    window.setTimeout = real;
}"""


def test_a_key_that_comes_as_the_address_follows_is_not_taken_back(plain: Path, open_page: OpenPage) -> None:
    page = open_page(plain)
    ids = listed(page)
    page.evaluate(MOVES_AS_THE_ADDRESS_FOLLOWS)
    hash_becomes(page, ids[1])
    page.keyboard.press("j")
    assert current(page) == ids[3]


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
    becomes(page, "#flag-count", "2 flagged")
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
    becomes(page, "#flag-count", "2 flagged")
    page_of(rows[1:], tmp_path)
    page.reload()
    becomes(page, "#flag-count", "2 flagged, 1 on this page")
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
