"""Small sets of token ids for tests of the scorer and the trainer, made by hand: no text, no tokenizer."""

from __future__ import annotations

import random
from pathlib import Path

import polars as pl

from dice_py.config.shared import ModelConfig
from dice_py.config.stages import ScoreConfig
from dice_py.scoring.pairs import score_pairs

CPU = ModelConfig(device="cpu", dtype="float32")
IDS = pl.List(pl.Int32)
FIRST, LAST = 6, 261
"""The tokens of tiny_models' tokenizers that are not special."""


def draw_ids(rng: random.Random, length: int) -> list[int]:
    """`length` token ids, none of them special."""
    return [rng.randint(FIRST, LAST) for _ in range(length)]


def token_pairs(count: int, seed: int = 0, stop: int = 4) -> pl.DataFrame:
    """`count` pairs of mixed lengths; every answer ends with the token `stop`."""
    rng = random.Random(seed)
    return pl.DataFrame(
        {
            "prompt_ids": [draw_ids(rng, rng.randint(1, 8)) for _ in range(count)],
            "chosen_ids": [[*draw_ids(rng, rng.randint(1, 12)), stop] for _ in range(count)],
            "rejected_ids": [[*draw_ids(rng, rng.randint(1, 12)), stop] for _ in range(count)],
        },
        schema={"prompt_ids": IDS, "chosen_ids": IDS, "rejected_ids": IDS},
    )


def scored_pairs(policy: Path, count: int, seed: int = 0) -> pl.DataFrame:
    """A training set: `token_pairs` and what `policy` says of them, by the scorer itself."""
    pairs = token_pairs(count, seed)
    logps = score_pairs(ScoreConfig(), CPU, policy=policy, pairs=pairs)
    return pairs.with_columns(ref_chosen_logps=logps["chosen_logp"], ref_rejected_logps=logps["rejected_logp"])
