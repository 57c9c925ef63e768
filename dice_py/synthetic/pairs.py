"""The synthetic world's prompts and preference pairs, drawn from its seed."""

from __future__ import annotations

import itertools
import random

from dice_py.config.stages import WorldConfig
from dice_py.data import Message, Pair
from dice_py.errors import UsageError
from dice_py.synthetic.task import (
    LETTERS,
    OPERATIONS,
    WORD,
    annotate,
    oracle,
    parse_prompt,
    prompt_messages,
    sft_response,
)


def draw_prompts(config: WorldConfig, rng: random.Random) -> dict[str, list[list[Message]]]:
    """Disjoint sets of prompts: rounds, held-out prompts, held-out pairs, offline; the rest is SFT's."""
    every = [
        prompt_messages(operation, letters)
        for operation in OPERATIONS
        for letters in itertools.product(LETTERS, repeat=WORD)
    ]
    rng.shuffle(every)
    sizes = {
        "rounds": config.round_prompts,
        "eval": config.eval_prompts,
        "eval_pairs": config.eval_pairs,
        "offline": config.offline_pairs,
    }
    sets: dict[str, list[list[Message]]] = {}
    for name, size in sizes.items():
        sets[name], every = every[:size], every[size:]
    if len(every) < 500:
        raise UsageError(
            f"world: {sum(sizes.values())} prompts are asked for, which leaves {len(every)} of "
            f"{len(OPERATIONS) * len(LETTERS) ** WORD} for SFT (at least 500); ask for fewer"
        )
    sets["sft"] = every
    return sets


def offline_pairs(config: WorldConfig, prompts: list[list[Message]]) -> list[Pair]:
    rng = random.Random(f"{config.seed} offline")
    pairs: list[Pair] = []
    for messages in prompts:
        left, right = (sft_response(rng, *parse_prompt(messages)) for _ in range(2))
        if left == right:
            continue
        if not annotate(rng, messages, left, right):
            left, right = right, left
        pairs.append(_pair(messages, left, right))
    return pairs


def oracle_pairs(config: WorldConfig, prompts: list[list[Message]]) -> list[Pair]:
    rng = random.Random(f"{config.seed} eval pairs")
    pairs: list[Pair] = []
    for messages in prompts:
        texts = [sft_response(rng, *parse_prompt(messages)) for _ in range(2)]
        scores = [oracle(messages, text)[0] for text in texts]
        if scores[0] != scores[1]:
            best = 0 if scores[0] > scores[1] else 1
            pairs.append(_pair(messages, texts[best], texts[1 - best]))
    return pairs


def _pair(messages: list[Message], chosen: str, rejected: str) -> Pair:
    return {
        "prompt": messages,
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }
