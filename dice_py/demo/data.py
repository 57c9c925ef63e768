"""The demo's prompts and pairs, which ship with the project, and how answers become pairs.

The prompts are in our own words; each row has a `prompt` and the `form` of answer that it asks for (rule.py).

    pair_prompts.jsonl        SmolLM2's answers to them made the offline pairs
    round_prompts.jsonl       the round samples answers to them
    held_out_prompts.jsonl    no training sees them; SmolLM2's answers to them made the held-out pairs

`dice_py/demo/make_pairs.py` makes both files of pairs, `pairs.jsonl` and `held_out_pairs.jsonl`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypedDict

import polars as pl

from dice_py.demo.rule import keeps_rule, words
from dice_py.storage.files import write_text

_FOLDER = Path(__file__).parent
PAIR_PROMPTS = _FOLDER / "pair_prompts.jsonl"
ROUND_PROMPTS = _FOLDER / "round_prompts.jsonl"
HELD_OUT_PROMPTS = _FOLDER / "held_out_prompts.jsonl"
PAIRS = _FOLDER / "pairs.jsonl"
HELD_OUT_PAIRS = _FOLDER / "held_out_pairs.jsonl"

PAIRS_PER_PROMPT = 2
SAMPLING: dict[str, Any] = {"temperature": 0.7, "top_p": 0.95, "max_new_tokens": 96}
"""How answers are sampled, for the pairs and in the demo."""


class DemoPrompt(TypedDict):
    """One prompt, and the form of answer that it asks for (rule.py)."""

    form: str
    prompt: str


class DemoPair(TypedDict):
    """Two answers to one prompt, of which only the chosen one keeps the rule."""

    form: str
    prompt: str
    chosen: str
    rejected: str


def read_jsonl(path: Path) -> list[Any]:
    """The rows of a JSONL file of the demo."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """Writes a JSONL file atomically; returns its path."""
    write_text(path, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
    return path


def with_rule(generations: pl.DataFrame, prompts: list[DemoPrompt]) -> pl.DataFrame:
    """Adds `prompt`, `form` and `keeps` (whether the rule is kept) to sampled answers.

    Args:
        generations: `prompt_id`, `response`, `finish_reason`; prompt_id counts through `prompts`.
    """
    asked = [prompts[number] for number in generations["prompt_id"]]
    answers = zip(asked, generations["response"], generations["finish_reason"], strict=True)
    return generations.with_columns(
        prompt=pl.Series([prompt["prompt"] for prompt in asked], dtype=pl.String),
        form=pl.Series([prompt["form"] for prompt in asked], dtype=pl.String),
        keeps=pl.Series(
            [
                keeps_rule(prompt["form"], prompt["prompt"], response, ended=reason == "stop")
                for prompt, response, reason in answers
            ],
            dtype=pl.Boolean,
        ),
    )


def label_pairs(answers: pl.DataFrame) -> list[DemoPair]:
    """Pairs of an answer that keeps the rule and one to the same prompt that does not, in order of prompts.

    A prompt gives at most two pairs, and no answer is in two of them. Of all pairs, the one whose lengths in words
    differ least is taken first, so that length alone tells little; then the first in the order of samples. Answers that
    were cut off are left out, as in mining.

    Args:
        answers: of `with_rule`.
    """
    pairs: list[DemoPair] = []
    ended = answers.filter(pl.col("finish_reason") == "stop")
    for _, group in ended.group_by("prompt_id", maintain_order=True):
        distinct = group.unique("response", keep="first", maintain_order=True)
        rows = [row for row in distinct.to_dicts() if words(row["response"])]
        kept, broken = ([row for row in rows if row["keeps"] is keeps] for keeps in (True, False))
        for _ in range(min(PAIRS_PER_PROMPT, len(kept), len(broken))):
            chosen, rejected = min(itertools.product(kept, broken), key=_length_difference)
            kept.remove(chosen)
            broken.remove(rejected)
            pairs.append(
                {
                    "form": chosen["form"],
                    "prompt": chosen["prompt"],
                    "chosen": chosen["response"].strip(),
                    "rejected": rejected["response"].strip(),
                }
            )
    return pairs


def _length_difference(pair: tuple[dict[str, Any], dict[str, Any]]) -> int:
    """In words."""
    chosen, rejected = pair
    return abs(len(words(chosen["response"])) - len(words(rejected["response"])))
