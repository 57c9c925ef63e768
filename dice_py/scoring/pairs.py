"""Log-probabilities of preference pairs under one model, in this process."""

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
    from dice_py.models.packing import Tokens


def score_pairs(
    config: ScoreConfig,
    models: ModelConfig,
    *,
    policy: Path,
    pairs: pl.DataFrame,
    report: Report = no_report,
) -> pl.DataFrame:
    """Σ_t log π(y_t | x, y_<t) in nats of both responses of each pair.

    Args:
        policy: folder of the model.
        pairs: `prompt_ids`, `chosen_ids` and `rejected_ids`, lists of token ids.
        report: receives a `progress` event after each batch.

    Returns:
        `chosen_logp` and `rejected_logp` f32, one row per pair.

    Raises:
        DataError: a column is not a list of integers or holds nulls, or a sequence cannot be scored (`Scorer.sums`).
    """
    with timed("import"):
        from dice_py.scoring.scorer import Scorer

    scorer = Scorer(held_model(policy, models), config, report)
    vocabulary = scorer.shape.vocabulary
    prompts: list[Tokens] = list(token_arrays(pairs, "prompt_ids", "the pairs", vocabulary))
    sides = [token_arrays(pairs, f"{side}_ids", "the pairs", vocabulary) for side in ("chosen", "rejected")]
    responses: list[Tokens] = [*sides[0], *sides[1]]
    done = 0

    def on_batch(count: int) -> None:
        nonlocal done
        done += count
        report("progress", stage="score pairs", done=done, total=len(responses), unit="sequences")

    sums = scorer.sums(prompts * 2, responses, on_batch)
    count = len(prompts)
    return pl.DataFrame(
        {"chosen_logp": sums[:count], "rejected_logp": sums[count:]},
        schema={"chosen_logp": pl.Float32, "rejected_logp": pl.Float32},
    )
