"""Pairs to read, as the inspect stage stores them (INSPECTED_PAIRS): plain ones, hostile ones, and many."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import polars as pl
from hostile_texts import HOSTILE

from dice_py.storage.schemas import INSPECTED_PAIRS

BETA = 0.1
SENTENCE = (
    "the model answers with a short proof that every even number above two which we have tried is the sum of primes "
    "however nobody has shown it for all of them so the claim stays open and careful readers say so"
)
WORDS = SENTENCE.split()

HOSTILE_TEXTS = HOSTILE | {
    "script": "<script>window.harmed = true</script>",
    "image": "<img src=x onerror=\"window.harmed = true\"><svg onload='window.harmed = true'>",
    "end of the data": "</script><script>window.harmed = true</script><!--",
    "end of a field": "</textarea><script>window.harmed = true</script>",
    "address": "javascript:window.harmed=true",
    "nul": "a\0b",
    "bidirectional paragraph": "\u202eright to left\u202c שלום \u2067a\u2069",
    "combining": "e" + "\u0301" * 200,
    "joiners": "👩\u200d👩\u200d👧 می\u200cخواهم",
    "not a number": "NaN",
    "long": "<b>word</b> " * 87_382,
}
"""By what they try; the last has more than a million characters. Polars holds no lone surrogate: one arrives only in a
name that is not UTF-8, of a run or a file."""


def stored(text: str) -> str:
    """A text as a frame can hold it."""
    return text.encode("utf-8", "backslashreplace").decode()


def turns(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def credits_of(text: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Credit of each word with the space before it."""
    words = text.split(" ")
    tokens = [word if i == 0 else " " + word for i, word in enumerate(words)]
    logps = -rng.gamma(1.0, 1.5, len(tokens))
    refs = logps - rng.normal(0.1, 1.0, len(tokens))
    return [
        {"text": token, "logp": logp, "ref_logp": ref, "credit": BETA * (logp - ref)}
        for token, logp, ref in zip(tokens, logps.tolist(), refs.tolist(), strict=True)
    ]


def pair_row(number: int, rng: np.random.Generator, candidates: int = 4, words: int = 30) -> dict[str, Any]:
    """An ordinary pair; every fourth one is replayed, and has no candidates."""
    mined = number % 4 != 3
    lengths = rng.integers(words // 2, words * 2, candidates)
    responses = [" ".join(rng.choice(WORDS, length)) + f" {number}." for length in lengths]
    credits = [credits_of(text, rng) for text in responses]
    rewards = [math.fsum(token["credit"] for token in credit) for credit in credits]
    ranked = sorted(range(candidates), key=lambda i: rewards[i] - 0.002 * lengths[i], reverse=True)
    best, worst = ranked[0], ranked[-1]
    roles = {best: "chosen", worst: "rejected"}
    source = "mined" if mined else "replay"
    return {
        "pair_id": f"r{1 + number % 2:02d}-{source}-{number}",
        "round": 1 + number % 2,
        "source": source,
        "prompt": [*turns("system", "Be brief."), *turns("user", f"Question {number}: is Goldbach's conjecture true?")],
        **{
            name: value
            for side, i in (("chosen", best), ("rejected", worst))
            for name, value in (
                (side, turns("assistant", responses[i])),
                (f"{side}_tokens", len(credits[i])),
                (f"{side}_finish_reason", "stop"),
                (f"{side}_reward", rewards[i]),
                (f"{side}_penalized_reward", rewards[i] - 0.002 * int(lengths[i])),
                (f"{side}_credit", credits[i]),
            )
        },
        "margin": rewards[best] - rewards[worst] - 0.002 * int(lengths[best] - lengths[worst]) if mined else None,
        "labels": json.dumps({"difficulty": "easy", "soft_label": 0.75}) if mined else None,
        "candidates": [
            {
                "sample_id": i,
                "response": responses[i],
                "reward": rewards[i],
                "penalized_reward": rewards[i] - 0.002 * int(lengths[i]),
                "response_tokens": len(credits[i]),
                "finish_reason": "length" if i == 2 else "stop",
                "role": roles.get(i),
            }
            for i in ranked
        ]
        if mined
        else [],
    }


def inspected(rows: list[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=INSPECTED_PAIRS)


def plain_pairs(count: int = 40, seed: int = 0, candidates: int = 4, words: int = 30) -> pl.DataFrame:
    """Ordinary pairs of two rounds."""
    rng = np.random.default_rng(seed)
    return inspected([pair_row(number, rng, candidates, words) for number in range(count)])


def many_pairs(count: int, distinct: int = 40, candidates: int = 4, words: int = 30) -> pl.DataFrame:
    """Ordinary pairs, of which only some are distinct: they cost less."""
    pairs = plain_pairs(distinct, candidates=candidates, words=words)
    repeated = pl.concat([pairs] * (count // distinct))
    return repeated.with_columns(pl.format("{}-{}", "pair_id", pl.int_range(pl.len())).alias("pair_id"))


def hostile_pairs() -> pl.DataFrame:
    """A pair for each hostile text, which stands everywhere that a text can stand; some figures are not finite."""
    rng = np.random.default_rng(1)
    rows = []
    for number, text in enumerate(map(stored, HOSTILE_TEXTS.values())):
        row = pair_row(0, rng)
        short = text[:1000]
        row |= {
            "pair_id": f"r01-mined-{number}",
            "source": f"source {short}",
            "prompt": turns(short or "user", text),
            "chosen": turns("assistant", text),
            "rejected": [*turns("tool", short), *turns("assistant", "other " + short)],
            "labels": json.dumps({short: short}) if number % 2 else text,
            "chosen_finish_reason": short,
            "chosen_credit": credits_of(text[:5000], rng),
            "chosen_reward": math.nan,
            "rejected_reward": -math.inf,
        }
        row["candidates"][1] |= {"response": text, "reward": math.nan}
        rows.append(row)
    return inspected(rows)
