"""The prompts and preference pairs of a synthetic world, drawn from its seed.

The same config gives the same prompts and pairs on every machine: only Python's `random` is used, and each kind of
data has a generator of its own.
"""

from __future__ import annotations

import itertools
import random

from dice_py.config.stages import WorldConfig
from dice_py.data import Message, Pair
from dice_py.errors import UsageError
from dice_py.synthetic.task import (
    LETTERS,
    OPERATIONS,
    WORD_LENGTH,
    annotate,
    oracle,
    parse_prompt,
    prompt_messages,
    sft_response,
)

MIN_SFT_PROMPTS = 500


def draw_prompts(config: WorldConfig, rng: random.Random) -> dict[str, list[list[Message]]]:
    """Divides all prompts of the task into disjoint sets, in random order.

    Returns:
        The prompts by use: `rounds`, `eval` (held-out prompts), `eval_pairs` (held-out pairs), `offline` (offline
        pairs), and `sft` (all others).

    Raises:
        UsageError: fewer than 500 prompts are left for SFT.
    """
    remaining = [
        prompt_messages(operation, letters)
        for operation in OPERATIONS
        for letters in itertools.product(LETTERS, repeat=WORD_LENGTH)
    ]
    rng.shuffle(remaining)
    sizes = {
        "rounds": config.round_prompts,
        "eval": config.eval_prompts,
        "eval_pairs": config.eval_pairs,
        "offline": config.offline_pairs,
    }
    sets: dict[str, list[list[Message]]] = {}
    for name, size in sizes.items():
        sets[name], remaining = remaining[:size], remaining[size:]
    if len(remaining) < MIN_SFT_PROMPTS:
        raise UsageError(
            f"world: the config requests {sum(sizes.values())} prompts, which leaves {len(remaining)} of "
            f"{len(OPERATIONS) * len(LETTERS) ** WORD_LENGTH} for SFT (at least {MIN_SFT_PROMPTS}): request fewer"
        )
    sets["sft"] = remaining
    return sets


def offline_pairs(config: WorldConfig, prompts: list[list[Message]]) -> list[Pair]:
    """One pair of SFT responses per prompt, labeled by the annotator; prompts with two equal responses are left out."""
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
    """One pair of SFT responses per prompt, labeled by the oracle; prompts with two equal scores are left out."""
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
