"""Log-probabilities of preference pairs under one model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from dice_py.config.shared import ModelConfig
from dice_py.config.stages import ScoreConfig
from dice_py.events import Report, no_report
from dice_py.models.loading import held_model
from dice_py.scoring.shards import token_arrays
from dice_py.timing import timed

if TYPE_CHECKING:
    from dice_py.scoring.packing import Tokens


def score_pairs(
    config: ScoreConfig,
    models: ModelConfig,
    *,
    policy: Path,
    pairs: pl.DataFrame,
    report: Report = no_report,
) -> pl.DataFrame:
    """`chosen_logp` and `rejected_logp` f32 of pairs with `prompt_ids`, `chosen_ids`, `rejected_ids`."""
    with timed("import"):
        from dice_py.scoring.scorer import Scorer

    prompts: list[Tokens] = list(token_arrays(pairs, "prompt_ids", "the pairs"))
    sides: list[Tokens] = [
        tokens for side in ("chosen_ids", "rejected_ids") for tokens in token_arrays(pairs, side, "the pairs")
    ]
    done = 0

    def on_batch(count: int) -> None:
        nonlocal done
        done += count
        report("progress", stage="score pairs", done=done, total=len(sides), unit="sequences")

    scorer = Scorer(held_model(policy, models), config, report)
    sums = scorer.sums(prompts * 2, sides, on_batch)
    half = len(prompts)
    return pl.DataFrame(
        {"chosen_logp": sums[:half], "rejected_logp": sums[half:]},
        schema={"chosen_logp": pl.Float32, "rejected_logp": pl.Float32},
    )
