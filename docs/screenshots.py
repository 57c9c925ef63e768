"""Takes the pictures of the README from the report of a run, and that of docs/evidence.md, in Chromium.

dice run --rounds 2 --run-dir runs/first
python docs/screenshots.py runs/first           # docs/pictures/report.png and docs/pictures/pairs.png
make evidence-real
python docs/screenshots.py runs/evidence        # docs/pictures/frontier.png
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

PICTURES = Path(__file__).parent / "pictures"
WIDTH, HEIGHT = 1200, 820


def main(folder: Path) -> None:
    """Takes the pictures of a run, or of the evidence on a real model."""
    PICTURES.mkdir(exist_ok=True)
    evidence = folder / "evidence.html"
    with sync_playwright() as playwright:
        alone = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses its sandbox to root
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=alone)
        scale = 2 if evidence.exists() else 1  # a single plot is small
        page = browser.new_page(
            viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light", device_scale_factor=scale
        )
        if evidence.exists():
            page.goto(evidence.absolute().as_uri())
            page.locator("section[aria-labelledby=frontier] figure").first.screenshot(path=PICTURES / "frontier.png")
        else:
            page.goto((folder / "report.html").absolute().as_uri())
            page.locator("[id^=mining-]").first.evaluate("element => element.scrollIntoView()")
            page.screenshot(path=PICTURES / "report.png")
            _show_a_pair(page)
            page.screenshot(path=PICTURES / "pairs.png")
        browser.close()


def _show_a_pair(page: Page) -> None:
    """The mined pair of the second greatest margin, with the credit of its tokens."""
    page.select_option("#find-source", "mined")
    page.select_option("#sort-by", "margin")
    page.focus("#pair-list")
    for key in ("Home", "j", "c"):
        page.keyboard.press(key)
    page.locator("#pairs").evaluate("element => element.scrollIntoView()")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
