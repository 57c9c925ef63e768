"""The annotator of the offline pairs: noisy, and biased towards long answers, by construction.

It sees two answers to one prompt, and prefers the first with the probability of a Bradley-Terry model,

    p(first) = σ(a · (score_1 − score_2) + b · (tokens_1 − tokens_2)),

where the scores are the oracle's. Then some of its preferences are flipped. So its pairs carry the oracle's taste, a
taste for length that the oracle does not have, and noise. How much of each is measured on the pairs that it made
(`Bias`), and reported.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypedDict

import polars as pl

from dice_py.evaluation.samples import mean_ci95
from dice_py.storage.keys import seed_for


class LabeledPair(TypedDict):
    """A preference pair in TRL's form, with what the annotator saw."""

    prompt: str
    chosen: str
    rejected: str
    chosen_score: float
    rejected_score: float
    chosen_tokens: int
    rejected_tokens: int


@dataclass(frozen=True)
class Annotator:
    """What it likes, and how often it errs."""

    score_weight: float = 4.0
    """a, per unit of the oracle's score."""
    length_weight: float = 0.03
    """b, per token."""
    flips: float = 0.08
    """The share of its preferences that are turned round."""

    def prefers_first(self, scores: tuple[float, float], tokens: tuple[int, int], draw: random.Random) -> bool:
        """Its verdict on two answers; it takes two numbers of `draw`."""
        utility = self.score_weight * (scores[0] - scores[1]) + self.length_weight * (tokens[0] - tokens[1])
        prefers = draw.random() < 1.0 / (1.0 + math.exp(-max(-500.0, min(500.0, utility))))
        return prefers != (draw.random() < self.flips)

    def as_json(self) -> dict[str, float]:
        """Its settings, by name."""
        return asdict(self)


def label_pairs(answers: pl.DataFrame, prompts: Sequence[str], annotator: Annotator, seed: int) -> list[LabeledPair]:
    """The annotator's pairs, in order of prompts.

    Of a prompt's answers that ended by themselves and have words, the first and second make a pair, then the third and
    fourth, and so on; equal texts count once, whatever space is around them. No answer is in two pairs.

    Args:
        answers: `prompt_id` (counts through `prompts`), `sample_id`, `response`, `response_tokens`, `finish_reason`,
            and `score`, the oracle's.
        seed: of the annotator's draws, which depend on the prompt alone.
    """
    said = answers.with_columns(pl.col("response").str.strip_chars())
    ended = said.filter((pl.col("finish_reason") == "stop") & (pl.col("response") != ""))
    pairs: list[LabeledPair] = []
    for (prompt_id,), group in ended.sort("prompt_id", "sample_id").group_by("prompt_id", maintain_order=True):
        draw = random.Random(seed_for(seed, "annotator", prompts[int(str(prompt_id))]))
        rows = group.unique("response", keep="first", maintain_order=True).to_dicts()
        for first, second in zip(rows[::2], rows[1::2], strict=False):
            scores = first["score"], second["score"]
            tokens = first["response_tokens"], second["response_tokens"]
            is_first = annotator.prefers_first(scores, tokens, draw)
            chosen, rejected = (first, second) if is_first else (second, first)
            pairs.append(_pair(prompts[int(str(prompt_id))], chosen, rejected))
    return pairs


def _pair(prompt: str, chosen: dict[str, Any], rejected: dict[str, Any]) -> LabeledPair:
    return {
        "prompt": prompt,
        "chosen": chosen["response"],
        "rejected": rejected["response"],
        "chosen_score": chosen["score"],
        "rejected_score": rejected["score"],
        "chosen_tokens": chosen["response_tokens"],
        "rejected_tokens": rejected["response_tokens"],
    }


def measured_bias(pairs: Sequence[LabeledPair], seed: int) -> dict[str, Any]:
    """How far the annotator agrees with the oracle, and how far it likes length.

    Args:
        pairs: of `label_pairs`.
        seed: of the bootstrap over prompts.

    Returns:
        `pairs`: their number. `agreement`: share of the pairs with different scores whose chosen answer has the
        higher one. `prefers_longer`: share of the pairs of different lengths whose chosen answer is the longer one.
        `longer_is_better`: share of the pairs that differ in both whose longer answer has the higher score: how far
        length alone would serve. Each share with its 95 % interval, "…_ci95"; None without such a pair.
        `length_gap`, mean tokens of chosen − rejected, and `score_gap`, the same of the scores; None without a pair.
    """
    scores = [pair["chosen_score"] - pair["rejected_score"] for pair in pairs]
    lengths = [pair["chosen_tokens"] - pair["rejected_tokens"] for pair in pairs]
    shares = {
        "agreement": [float(score > 0) if score else None for score in scores],
        "prefers_longer": [float(length > 0) if length else None for length in lengths],
        "longer_is_better": [float(s * t > 0) if s and t else None for s, t in zip(scores, lengths, strict=True)],
    }
    found: dict[str, Any] = {"pairs": len(pairs)}
    prompts = [pair["prompt"] for pair in pairs]
    for name, values in shares.items():
        rows = pl.DataFrame({"prompt": prompts, "value": pl.Series(values, dtype=pl.Float64)}).drop_nulls()
        found[name] = rows["value"].mean()
        found[f"{name}_ci95"] = mean_ci95(rows["prompt"], rows["value"], seed) if rows.height else None
    for name, gaps in (("length_gap", lengths), ("score_gap", scores)):
        found[name] = sum(gaps) / len(gaps) if gaps else None
    return found
