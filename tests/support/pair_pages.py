"""Pages with a pair browser, and what a reader sees in one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inspected_pairs import inspected

from dice_py.reporting.inspect_page import write_inspect_page

if TYPE_CHECKING:
    from playwright.sync_api import Page


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


def length_gap(row: dict[str, Any]) -> int:
    return int(row["chosen_tokens"]) - int(row["rejected_tokens"])
