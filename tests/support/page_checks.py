"""What a page must be for all who read it: names, order, contrast, focus, width; and what it may not do.

The checks are the project's own, and fewer than a checker of accessibility has. page_checks.js looks at the elements.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Page

MOST_STOPS = 60
"""Stops of the Tab key that are looked at."""


@functools.cache
def _script() -> str:
    return Path(__file__).with_suffix(".js").read_text(encoding="utf-8")


def page_problems(page: Page) -> list[str]:
    """What is wrong with the page as it is shown now, each with its element; empty if nothing is.

    Title, language, one h1 and one main, order of headings, ids, names of controls and pictures, headers of tables,
    contrast of texts (4.5, large ones 3) and of borders of controls (3), scrolling by the keyboard, no scripts in
    attributes, nothing from outside, and no wider than the window.
    """
    found: list[str] = page.evaluate(_script())
    return found


def tab_stops(page: Page) -> list[str]:
    """The elements that the Tab key reaches from the top of the page, in order, each as "tag#id or text".

    Raises:
        AssertionError: the focus cannot be seen on one of them.
    """
    page.evaluate("document.activeElement?.blur(); window.scrollTo(0, 0); getSelection().removeAllRanges()")
    stops: list[str] = []
    unseen: list[str] = []
    for _ in range(MOST_STOPS):
        page.keyboard.press("Tab")
        name, visible = page.evaluate("""() => {
            const node = document.activeElement;
            if (!node || node === document.body) return ["", true];
            const style = getComputedStyle(node);
            const seen = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 1;
            const words = node.textContent.trim().slice(0, 20);
            return [node.nodeName.toLowerCase() + (node.id ? "#" + node.id : " " + words), seen];
        }""")
        if not name or name in stops:
            break
        stops.append(name)
        if not visible:
            unseen.append(name)
    assert not unseen, f"the focus cannot be seen on {unseen}"
    return stops


class Watch:
    """What a page did while it was open: messages of the console, errors, dialogs, and requests."""

    def __init__(self, page: Page) -> None:
        self.faults: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.faults.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        page.on("request", lambda request: self.requests.append(request.url))

        def refuse(dialog: object) -> None:
            self.faults.append("a dialog opened")
            dialog.dismiss()  # type: ignore[attr-defined]

        page.on("dialog", refuse)

    def problems(self) -> list[str]:
        """Faults, and what was asked for beside files and the page's own blobs."""
        outside = [url for url in self.requests if not url.startswith(("file://", "blob:"))]
        return [*self.faults, *(f"request of {url}" for url in outside)]
