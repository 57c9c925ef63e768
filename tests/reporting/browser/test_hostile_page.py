"""Hostile texts in the pair browser: shown as `visible` shows them, and never run."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hostile_texts import HOSTILE, obeyed
from inspected_pairs import HOSTILE_TEXTS, hostile_pairs, inspected, plain_pairs, stored, turns

from dice_py.reporting.foreign_text import visible
from dice_py.reporting.inspect_page import write_inspect_page
from dice_py.reporting.pair_data import SCRIPTS, STYLES, pair_data
from dice_py.reporting.render import PAGE, render_page
from dice_py.storage.files import write_text

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser

OpenPage = Callable[..., "Page"]
TITLE = "\u202epage\x1b]0;owned\x07</title><script>window.harmed = true</script>\udcff\0"
FIRST = 20_000
"""Characters of a text that are shown at once."""


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    facts = [(f"{name} {text}", text) for name, text in HOSTILE.items()]
    out = tmp_path_factory.mktemp("page") / "hostile.html"
    return write_inspect_page(hostile_pairs(), out, title=TITLE, facts=facts)


def unharmed(page: Page) -> bool:
    """Whether no script of a text ran, no element of a text came to be, and no character of one would be obeyed."""
    harmed, strange, text = page.evaluate("""() => [
        window.harmed !== undefined,
        document.querySelectorAll("main script:not(#pair-data), img, svg, b, [onerror], [onload]").length,
        document.querySelector("main").textContent.replace(document.querySelector("#pair-data").textContent, ""),
    ]""")
    return not harmed and not strange and obeyed(text.translate(dict.fromkeys((0x200C, 0x200D)))) == []


def first_part(text: str) -> str:
    """What is shown of a text, with the words of the button below a long one."""
    left = len(text) - FIRST
    return visible(text[:FIRST]) + ("" if left <= 0 else f"Show 250,000 of {left:,} more characters")


ALL_SHOWN = """() => {
    const press = (key) => document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
    const texts = (selector) => Array.from(document.querySelectorAll(selector), (node) => node.textContent);
    const found = [];
    const count = document.querySelector("#pair-list [role=option]").getAttribute("aria-setsize");
    for (let i = 0; i < count; i++) {
        const each = { name: texts("#pair-name"), prompt: texts("#pair-prompt .text"), plain: texts(".side .text") };
        each.facts = texts("#chosen-facts dd, #rejected-facts dd");
        document.querySelectorAll("#candidate-rows details").forEach((node) => (node.open = true));
        press("d");
        each.differing = texts(".side .text");
        press("c");
        each.credited = texts("#chosen-text .tokens");
        press("c");
        found.push(each);
        press("j");
    }
    return found;
}"""


def test_hostile_texts_are_shown_and_not_run(hostile: Path, open_page: OpenPage) -> None:
    page = open_page(hostile)
    assert page.title() == visible(TITLE)
    assert page.text_content("h1") == visible(TITLE)
    assert page.locator(".wide > .facts dd").all_text_contents() == [visible(text) for text in HOSTILE.values()]
    found = page.evaluate(ALL_SHOWN)
    assert len(found) == len(HOSTILE_TEXTS)
    for number, (text, pair) in enumerate(zip(map(stored, HOSTILE_TEXTS.values()), found, strict=True)):
        short = text[:1000]
        answers = [first_part(text), visible(short), visible("other " + short)]
        assert pair["name"] == [f"r01-mined-{number}"]
        assert pair["prompt"] == [first_part(text)]
        assert pair["plain"] == answers
        assert pair["differing"] == answers
        assert pair["credited"] == [visible(text[:5000])]
        assert [pair["facts"][i] for i in (0, 4, 5)] == ["NaN", visible(short), "−∞"]
    assert unharmed(page)


def test_hostile_candidates(hostile: Path, open_page: OpenPage) -> None:
    page = open_page(hostile)
    for number in (0, 17, len(HOSTILE_TEXTS) - 1):
        page.evaluate("hash => { location.hash = hash; }", f"#pair=r01-mined-{number}")
        text = stored(list(HOSTILE_TEXTS.values())[number])
        page.locator("#pair-name", has_text=re.compile(f"-{number}$")).wait_for()
        row = page.locator("#candidate-rows tr").nth(1)
        row.locator("summary").click()
        assert row.locator(".text").text_content() == first_part(text)
        assert unharmed(page)


def test_a_line_of_the_list_shows_controls_too(hostile: Path, open_page: OpenPage) -> None:
    page = open_page(hostile)
    lines = page.locator("#pair-rows .line").all_text_contents()
    texts = [stored(text) for text in HOSTILE_TEXTS.values()][: len(lines)]
    assert len(lines) > 20
    for line, text in zip(lines, texts, strict=True):
        words = visible(" ".join(re.split(r"[ \n\t]+", text)))
        assert line == words or (line.endswith("…") and words.startswith(line[:-1]))


def test_more_of_a_long_answer(hostile: Path, open_page: OpenPage) -> None:
    page = open_page(hostile, f"#pair=r01-mined-{len(HOSTILE_TEXTS) - 1}")
    text = HOSTILE_TEXTS["long"]
    assert len(text) > 1_000_000
    box = page.locator("#chosen-text .text")
    labels = []
    while (button := page.query_selector("#chosen-text .more")) is not None:
        labels.append(button.text_content())
        button.evaluate("button => button.click()")
    assert len(labels) == 5
    assert labels[-1] == f"Show the other {len(text) - FIRST - 4 * 250_000:,} characters"
    assert box.text_content() == text
    assert unharmed(page)


def test_every_character_is_escaped_as_python_does(hostile: Path, open_page: OpenPage) -> None:
    page = open_page(hostile)
    found = page.evaluate("""() => {
        const escaped = [];
        for (let code = 0; code < 0x110000; code++) {
            const character = String.fromCodePoint(code);
            const shown = visible(character);
            if (shown !== character) escaped.push([code, shown]);
        }
        return escaped;
    }""")
    # Both know only the characters of their own version of Unicode; those of both are compared.
    unknown = set(page.evaluate("codes => codes.filter((code) => /\\p{Cn}/u.test(String.fromCodePoint(code)))", CODES))
    known = [code for code in CODES if code not in unknown]
    assert len(known) > 2000  # 2,048 of them are surrogates
    assert {code: shown for code, shown in found if unicodedata.category(chr(code)) != "Cn"} == {
        code: visible(chr(code)) for code in known
    }


CODES = [code for code in range(sys.maxunicode + 1) if visible(chr(code)) != chr(code)]


def test_escapes_are_told_from_what_was_written(tmp_path: Path, open_page: OpenPage) -> None:
    row = plain_pairs(1).to_dicts()[0]
    row["chosen"] = turns("assistant", "\\x1b is not \x1b\x07, " + "\x1bx" * 5000)
    page = open_page(write_inspect_page(inspected([row]), tmp_path / "page.html", title="page", facts=[]))
    escapes = page.locator("#chosen-text .escape")
    assert escapes.nth(0).text_content() == "\\x1b\\x07"
    assert escapes.count() == 1000  # more would make the page slow
    assert page.text_content("#chosen-text") == visible(row["chosen"][0]["content"])


def test_names_of_runs(tmp_path: Path, open_page: OpenPage) -> None:
    """A folder's name may be no UTF-8: Python reads it with lone surrogates."""
    runs = {"a\udcff": plain_pairs(4), "</script><script>window.harmed = true</script>\x1b[2J": plain_pairs(4, seed=1)}
    html = render_page("inspect.html.j2", title="runs", styles=STYLES, scripts=SCRIPTS, facts=[], pairs=pair_data(runs))
    write_text(tmp_path / "page.html", html)
    page = open_page(tmp_path / "page.html")
    labels = page.locator("#find-run option").all_text_contents()
    assert labels[0] == "any"
    assert labels[1] == "a\\udcff"
    assert visible(list(runs)[1]).startswith(labels[2].removesuffix("…"))
    page.select_option("#find-run", "=1")
    assert page.inner_text("#pair-count") == "4 of 8 pairs"
    assert page.text_content("#pair-name") == visible(list(runs)[1] + "/r01-mined-0")
    page.keyboard.press("j")
    page.wait_for_url(lambda url: "r01-mined-2" in url)
    page.reload()
    assert page.text_content("#pair-name") == visible(list(runs)[1] + "/r01-mined-2")
    page.select_option("#find-run", "=0")
    assert page.text_content("#pair-name") == "a\\udcff/r01-mined-0"
    page.keyboard.press("f")
    assert unharmed(page)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_make_no_html(name: str) -> None:
    text = (PAGE / name).read_text(encoding="utf-8")
    never = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|\.setAttribute\(\"(style|on)|</"
    )
    assert re.findall(never, text) == []
    assert text.startswith('"use strict";\n')
    assert len(text.splitlines()) <= 400
