"""Debian's Chromium, driven by Playwright. Where either is absent, the tests are skipped, and say so."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from inspected_pairs import plain_pairs
from page_checks import Watch

from dice_py.reporting.inspect_page import write_inspect_page

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

OpenPage = Callable[..., "Page"]


def _executable() -> str | None:
    return os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


# Not for the session: Playwright's event loop runs as long as it is open, and other tests start one of their own.
@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright for Python is not installed")
    executable = _executable()
    if executable is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium), and CHROMIUM names none")
    # Chromium's sandbox refuses to run as root.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Browser) -> Iterator[OpenPage]:
    """Opens a file in a window of its own. After the test, no page may have done what a page may not do."""
    contexts: list[Any] = []
    watches: list[Watch] = []

    def open_page(path: Path, fragment: str = "", script: str = "", **options: Any) -> Page:
        context = chromium.new_context(**{"viewport": {"width": 1300, "height": 900}, **options})
        contexts.append(context)
        context.set_default_timeout(10_000)
        if script:
            context.add_init_script(script)
        page = context.new_page()
        watches.append(Watch(page))
        page.goto(path.as_uri() + fragment)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [problem for watch in watches for problem in watch.problems()] == []


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of 24 ordinary pairs."""
    facts = [("file", "pairs.jsonl"), ("policy", "models/" + "long-name-" * 20), ("β", "0.1")]
    out = tmp_path_factory.mktemp("page") / "plain.html"
    return write_inspect_page(plain_pairs(24), out, title="Pairs of pairs.jsonl", facts=facts)
