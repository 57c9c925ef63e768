"""What is read of the runs: the figures of every policy and the answers, by hand; and how they are shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hostile_texts import HOSTILE, obeyed
from made_evidence import ARMS, BAD, GOOD, NEUTRAL, PAIRS, START_METRICS, ablation, made_evidence

from dice_py.evidence.annotator import Annotator
from dice_py.evidence.page import evidence_page, write_evidence_page
from dice_py.evidence.results import METRICS, SFT, START, evidence_results
from dice_py.evidence.settings import SMALL
from dice_py.evidence.summary import result_lines
from dice_py.storage.digests import file_state

pytest.importorskip("vaderSentiment", reason="the oracle's package is not installed")


@pytest.fixture
def results(tmp_path: Path) -> dict[str, Any]:
    return made_evidence(tmp_path)


def metric(results: dict[str, Any], policy: str, name: str) -> tuple[Any, Any]:
    (found,) = [each["metrics"][name] for each in results["policies"] if each["name"] == policy]
    return found["value"], found["ci95"]


def test_the_figures_of_every_policy(results: dict[str, Any]) -> None:
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    rounds = [f"{label}, round {number}" for label in ARMS.values() for number in (1, 2)]
    assert [each["name"] for each in results["policies"]] == [SFT, START, *rounds]
    assert all(list(each["metrics"]) == list(METRICS) for each in results["policies"])
    # The SFT model's own samples, and π_1's win rate over it turned round.
    score, interval = metric(results, SFT, "function_score")
    assert interval[0] <= score <= interval[1]
    assert score == pytest.approx((0.5719 - 0.4588) / 4, abs=1e-4)
    assert metric(results, SFT, "function_win_rate") == (0.375, [0.25, 0.5])
    assert metric(results, SFT, "mean_response_tokens")[0] == 6.5
    assert metric(results, SFT, "kl_to_initial_reference") == (0.0, None)
    assert metric(results, SFT, "kl_to_start") == (None, None)
    # π_1 is compared with the SFT model there, and with itself here.
    assert metric(results, START, "function_score") == (0.25, [0.2, 0.3])
    assert metric(results, START, "kl_to_initial_reference") == (1.5, [1.0, 2.0])
    assert metric(results, START, "kl_to_start") == (0.0, None)
    assert metric(results, START, "function_win_rate") == (0.5, None)
    assert metric(results, rounds[1], "function_score") == (0.5, [0.3, 0.6])
    assert metric(results, rounds[1], "distinct_1") == (None, None)
    assert results["mining"][1] == {"arm": "neither", "round": 2, "pairs": 100.0, "alpha": 0.01}
    assert results["annotator"]["measured"]["agreement"] == 1.0


def test_the_answers_to_read(results: dict[str, Any]) -> None:
    first, second = results["answers"]
    assert (first["prompt"], second["prompt"]) == ("Review 0.", "Review 1.")
    said = {each["policy"]: (each["response"], each["tokens"], each["ended"]) for each in first["answers"]}
    assert said == {
        SFT: (NEUTRAL, 7, False),
        START: (GOOD, 7, False),
        "neither": (f"neither: {GOOD}", 9, True),
        "length penalty and replay": (f"both: {GOOD}", 9, True),
    }
    assert {each["policy"]: each["response"] for each in second["answers"]}[SFT] == BAD
    assert first["answers"][1]["score"] == pytest.approx(0.5719)


def test_what_is_printed(results: dict[str, Any]) -> None:
    lines = result_lines(results)
    (start,) = [line for line in lines if line.startswith(START)]
    assert start.split() == ["π_1", "+0.250", "0.500", "5.0", "–", "1.50", "0.00"]
    assert lines[-1] == (
        "with the length penalty − without it [both, round 2], oracle score: +0.100 (+0.020 to +0.180): shown"
    )


def test_the_page(results: dict[str, Any], tmp_path: Path) -> None:
    page = write_evidence_page(results, tmp_path / "evidence.html")
    assert file_state(page) == "intact"
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg ") == 4
    assert "Oracle score against KL. π_1: 0.25 at 1.5 nats" in text
    assert f"SFT model: {metric(results, SFT, 'function_score')[0]:.4g} at 0 nats" in text
    shown = ("length penalty and replay, round 2", "0.5 (0.3 to 0.6)", "+0.1 (+0.02 to +0.18)", "shown", "Review 1.")
    assert all(part in text for part in shown)
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org/", "")


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_hostile_texts_are_shown(hostile: str, results: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # Without the plots, whose texts are not the model's.
    monkeypatch.setattr("dice_py.evidence.page.charts.cannot_draw", lambda: "plots are left out")
    results["answers"][0]["prompt"] = f"Review {hostile}"
    results["answers"][0]["answers"][0]["response"] = hostile
    results["policies"][2]["name"] = hostile
    page = evidence_page(results)
    assert obeyed(page) == []
    assert "plots are left out" in page
    if "<" in hostile or '"' in hostile:
        assert hostile not in page
    page.encode()


def test_results_of_an_unfinished_ablation(results: dict[str, Any], tmp_path: Path) -> None:
    found = ablation() | {"unfinished": ["both/seed-3"], "contrasts": []}
    found["arms"][1] |= {"rounds": []}
    partial = evidence_results(
        found, START_METRICS, tmp_path, pairs=PAIRS, annotator=Annotator(), sizes=SMALL, model="m", seed=3
    )
    assert len(partial["policies"]) == 4
    assert "both/seed-3" in evidence_page(partial)
    assert len(result_lines(partial)) == 7
