"""The page of the evidence in a browser: names, order, contrast and width, and answers that hold anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hostile_texts import HOSTILE
from made_evidence import made_evidence
from page_checks import page_problems, tab_stops

from dice_py.evidence.page import write_evidence_page

pytestmark = pytest.mark.browser


@pytest.fixture
def results(tmp_path: Path) -> dict[str, Any]:
    pytest.importorskip("vaderSentiment", reason="the oracle's package is not installed")
    return made_evidence(tmp_path)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1300, 420])
def test_the_page_serves_all(scheme: str, width: int, results: dict[str, Any], tmp_path: Path, open_page: Any) -> None:
    results["answers"][0]["answers"][0]["response"] = "a-long-word-" * 60
    page = open_page(
        write_evidence_page(results, tmp_path / "evidence.html"),
        color_scheme=scheme,
        viewport={"width": width, "height": 900},
    )
    assert page_problems(page) == []
    assert len(tab_stops(page)) > 5


def test_hostile_answers_are_text(results: dict[str, Any], tmp_path: Path, open_page: Any) -> None:
    answers = results["answers"][0]["answers"]
    results["answers"] = [
        {"prompt": f"Review {text}", "answers": [{**answers[0], "response": text, "policy": text}]}
        for text in HOSTILE.values()
    ]
    page = open_page(write_evidence_page(results, tmp_path / "evidence.html"))
    assert page.locator(".said").count() == len(HOSTILE)
    assert page.locator(".said :not(br)").count() == 0  # no element of theirs
    assert page_problems(page) == []
