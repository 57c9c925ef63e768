"""The demo's files: prompts, pairs, and how answers become pairs."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import polars as pl
import pytest

from dice_py.data import read_pairs, read_prompts
from dice_py.demo.data import (
    HELD_OUT_PAIRS,
    HELD_OUT_PROMPTS,
    PAIR_PROMPTS,
    PAIRS,
    PAIRS_PER_PROMPT,
    ROUND_PROMPTS,
    DemoPrompt,
    label_pairs,
    read_jsonl,
    with_rule,
)
from dice_py.demo.rule import KINDS, keeps_rule, words

PROMPT_FILES = (PAIR_PROMPTS, ROUND_PROMPTS, HELD_OUT_PROMPTS)


def asked(file: Path) -> list[str]:
    return [" ".join(words(row["prompt"])) for row in read_jsonl(file)]


def test_prompts_are_unique_and_short() -> None:
    prompts = [prompt for file in PROMPT_FILES for prompt in asked(file)]
    assert len(set(prompts)) == len(prompts)
    assert all(len(prompt.split()) <= 25 for prompt in prompts)


def test_no_prompt_has_two_uses() -> None:
    for one, other in itertools.combinations(PROMPT_FILES, 2):
        assert not set(asked(one)) & set(asked(other))
    # What is trained on is not what is measured on.
    assert set(asked(PAIRS)) <= set(asked(PAIR_PROMPTS))
    assert set(asked(HELD_OUT_PAIRS)) <= set(asked(HELD_OUT_PROMPTS))


def test_sizes_are_those_that_the_page_names() -> None:
    counts = [len(read_jsonl(file)) for file in (*PROMPT_FILES, PAIRS, HELD_OUT_PAIRS)]
    page = (Path(__file__).parents[2] / "docs" / "demo.md").read_text(encoding="utf-8")
    for count in counts:
        assert f" {count} " in page


@pytest.mark.parametrize("file", PROMPT_FILES)
def test_every_prompt_asks_for_a_form_that_the_rule_knows(file: Path) -> None:
    rows = read_jsonl(file)
    assert {row["form"].split()[0] for row in rows} == set(KINDS)
    for row in rows:
        keeps_rule(row["form"], row["prompt"], "yes", ended=True)  # its argument can be read
        assert read_prompts(file).height == len(rows)


@pytest.mark.parametrize("file", [PAIRS, HELD_OUT_PAIRS])
def test_of_each_pair_only_the_chosen_answer_keeps_the_rule(file: Path) -> None:
    rows = read_jsonl(file)
    for row in rows:
        assert keeps_rule(row["form"], row["prompt"], row["chosen"], ended=True)
        assert not keeps_rule(row["form"], row["prompt"], row["rejected"], ended=True)
    assert read_pairs(file).height == len(rows)
    assert max(Counter(asked(file)).values()) <= PAIRS_PER_PROMPT
    said = [(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]
    assert len(set(said)) == len(said)


def test_length_alone_tells_little_of_the_pairs() -> None:
    differences = [len(words(row["chosen"])) - len(words(row["rejected"])) for row in read_jsonl(PAIRS)]
    shorter = sum(difference < 0 for difference in differences) / len(differences)
    assert shorter < 0.7


def answers(*rows: tuple[int, str, str]) -> pl.DataFrame:
    prompts: list[DemoPrompt] = [
        {"form": "words 3", "prompt": "Describe a boat in three words."},
        {"form": "starts Boats", "prompt": "Begin with Boats."},
    ]
    frame = pl.DataFrame(rows, schema=["prompt_id", "response", "finish_reason"], orient="row")
    return with_rule(frame, prompts)


def test_pairs_of_nearest_length() -> None:
    rows = (
        (0, " Small and red.", "stop"),
        (0, "Red.", "stop"),
        (0, "A boat that is very, very red.", "stop"),
        (0, "It is a red boat.", "stop"),
        (1, "Boats float.", "stop"),
        (1, "Boats sink.", "stop"),
    )
    labeled = answers(*rows)
    assert labeled["keeps"].to_list() == [True, True, False, False, True, True]
    pairs = label_pairs(labeled)  # the second prompt has no answer that breaks the rule
    assert pairs[0]["form"] == "words 3"
    # The nearest ones first; no answer is used twice, and a prompt gives two pairs at most.
    nearest = [("Small and red.", "It is a red boat."), ("Red.", "A boat that is very, very red.")]
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == nearest
    third = answers(*rows, (0, "Blue.", "stop"), (0, "No boat is red or blue.", "stop"))
    assert len(label_pairs(third)) == PAIRS_PER_PROMPT


def test_answers_that_were_cut_off_make_no_pair() -> None:
    labeled = answers((0, "Small and red.", "stop"), (0, "It is a red boat.", "length"), (0, "", "stop"))
    assert labeled["keeps"].to_list() == [True, False, False]
    assert label_pairs(labeled) == []
