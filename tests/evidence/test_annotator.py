"""The annotator of the offline pairs: which answers make a pair, and that its biases are as they are set."""

from __future__ import annotations

import random
from typing import Any

import polars as pl
import pytest

from dice_py.evaluation.samples import mean_ci95
from dice_py.evidence.annotator import Annotator, label_pairs, measured_bias

SURE = Annotator(score_weight=1000.0, length_weight=0.0, flips=0.0)
PROMPTS = [f"Review thing {n}." for n in range(4000)]


def answers(*rows: tuple[int, str, float, int, str]) -> pl.DataFrame:
    """(prompt_id, response, score, tokens, finish_reason); samples count on within a prompt."""
    schema = ["prompt_id", "response", "score", "response_tokens", "finish_reason"]
    frame = pl.DataFrame(rows, schema=schema, orient="row")
    return frame.with_columns(sample_id=pl.int_range(pl.len()).over("prompt_id"))


def many(count: int) -> pl.DataFrame:
    """Two answers to each prompt, whose scores and lengths are independent of each other."""
    draw = random.Random(0)
    rows = [
        (prompt, f"answer {sample}", draw.uniform(-1, 1), draw.randint(20, 60), "stop")
        for prompt in range(count)
        for sample in range(2)
    ]
    return answers(*rows)


def test_which_answers_make_pairs() -> None:
    frame = answers(
        *[(2, "bad", -0.5, 9, "stop"), (2, " good ", 0.5, 3, "stop"), (2, "alone", 0.0, 5, "stop")],
        *[(0, "cut", 0.9, 96, "length"), (0, "a", 0.1, 4, "stop"), (0, " a", 0.1, 4, "stop"), (0, "b", 0.2, 8, "stop")],
        *[(1, "\n", 0.0, 1, "stop"), (1, "only one", 0.3, 5, "stop")],
    )
    # Of prompt 0 neither what was cut off nor what was said twice; of prompt 1 nothing is left to compare with.
    assert label_pairs(frame, PROMPTS, SURE, 0) == [
        {
            "prompt": "Review thing 0.", "chosen": "b", "rejected": "a", "chosen_score": 0.2, "rejected_score": 0.1,
            "chosen_tokens": 8, "rejected_tokens": 4,
        },
        {
            "prompt": "Review thing 2.", "chosen": "good", "rejected": "bad", "chosen_score": 0.5,
            "rejected_score": -0.5, "chosen_tokens": 3, "rejected_tokens": 9,
        },
    ]  # fmt: skip


def test_four_answers_make_two_pairs() -> None:
    frame = answers(*[(0, f"answer {n}", n / 10, 10, "stop") for n in range(4)])
    pairs = label_pairs(frame, PROMPTS, SURE, 0)
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [
        ("answer 1", "answer 0"),
        ("answer 3", "answer 2"),
    ]


def test_a_verdict_depends_on_the_prompt_alone() -> None:
    noisy = Annotator()
    frame = many(300)
    pairs = label_pairs(frame, PROMPTS, noisy, 1)
    assert label_pairs(frame.sort("prompt_id", descending=True), PROMPTS, noisy, 1) == pairs
    later = label_pairs(frame.filter(pl.col("prompt_id") >= 100), PROMPTS, noisy, 1)
    assert later == [pair for pair in pairs if pair["prompt"] in PROMPTS[100:]]
    assert label_pairs(frame, PROMPTS, noisy, 2) != pairs


@pytest.mark.parametrize(
    ("settings", "agreement", "longer"),
    [
        ({"score_weight": 1000.0, "length_weight": 0.0, "flips": 0.0}, 1.0, 0.5),
        ({"score_weight": 0.0, "length_weight": 1000.0, "flips": 0.0}, 0.5, 1.0),
        ({"score_weight": 1000.0, "length_weight": 0.0, "flips": 0.2}, 0.8, 0.5),
        ({"score_weight": 0.0, "length_weight": 0.0, "flips": 0.0}, 0.5, 0.5),
    ],
)
def test_the_biases_are_as_they_are_set(settings: dict[str, Any], agreement: float, longer: float) -> None:
    measured = measured_bias(label_pairs(many(2000), PROMPTS, Annotator(**settings), 3), 0)
    assert measured["pairs"] == 2000
    assert measured["agreement"] == pytest.approx(agreement, abs=0.03)
    assert measured["prefers_longer"] == pytest.approx(longer, abs=0.03)
    assert measured["longer_is_better"] == pytest.approx(0.5, abs=0.03)
    for name in ("agreement", "prefers_longer"):
        low, high = measured[f"{name}_ci95"]
        assert low <= measured[name] <= high


def test_its_probability_is_that_of_bradley_and_terry() -> None:
    draw = random.Random(0)
    annotator = Annotator(score_weight=2.0, length_weight=0.1, flips=0.0)
    won = sum(annotator.prefers_first((0.25, 0.0), (30, 40), draw) for _ in range(20_000)) / 20_000
    assert won == pytest.approx(1 / (1 + 2.718281828 ** -(2.0 * 0.25 - 0.1 * 10)), abs=0.012)
    # Utilities that no exponential can hold.
    assert Annotator(score_weight=1e6, flips=0.0).prefers_first((1.0, -1.0), (1, 1), draw)
    assert not Annotator(score_weight=1e6, flips=0.0).prefers_first((-1.0, 1.0), (1, 1), draw)


def test_measures_by_hand() -> None:
    def pair(prompt: str, scores: tuple[float, float], tokens: tuple[int, int]) -> Any:
        return {
            "prompt": prompt,
            "chosen_score": scores[0], "rejected_score": scores[1],
            "chosen_tokens": tokens[0], "rejected_tokens": tokens[1],
        }  # fmt: skip

    # Right and longer; wrong and longer; a tie of scores, shorter; right, equally long.
    pairs = [
        *(pair("one", (1, 0), (9, 5)), pair("one", (0, 1), (9, 5))),
        *(pair("two", (0, 0), (5, 9)), pair("three", (1, 0), (7, 7))),
    ]
    found = measured_bias(pairs, 0)
    assert (found["pairs"], found["agreement"]) == (4, 2 / 3)
    assert (found["prefers_longer"], found["longer_is_better"]) == (2 / 3, 0.5)
    assert (found["length_gap"], found["score_gap"]) == (1.0, 0.25)
    # Both pairs of a prompt are drawn together.
    assert found["agreement_ci95"] == mean_ci95(pl.Series(["one", "one", "three"]), pl.Series([1.0, 0.0, 1.0]), 0)
    nothing = measured_bias([], 0)
    assert (nothing["pairs"], nothing["agreement"], nothing["length_gap"]) == (0, None, None)
