"""The page of promises: every test that it names exists, in the file that it links to."""

from __future__ import annotations

import re

from places import ROOT

PAGE = (ROOT / "docs/promises.md").read_text(encoding="utf-8")
NAMED = re.findall(r"\[`(test_\w+)`\]\(\.\./(tests/[\w/]+\.py)\)", PAGE)


def test_every_named_test_exists() -> None:
    assert len(NAMED) == PAGE.count("[`test_")
    for name, file in NAMED:
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), name


def test_every_promise_names_a_test() -> None:
    sections = PAGE.split("\n## ")[1:]
    assert sections
    assert [section.splitlines()[0] for section in sections if "Shown by [`test_" not in section] == []
