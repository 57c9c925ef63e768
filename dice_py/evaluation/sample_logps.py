"""Log-probabilities of a policy's samples under other models, by the packed scorer."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from dice_py.config.shared import ModelConfig
from dice_py.config.stages import ScoreConfig
from dice_py.events import Report, no_report
from dice_py.models.loading import held_model
from dice_py.scoring.shards import token_arrays
from dice_py.timing import timed


def sample_logps(
    folder: Path, models: ModelConfig, config: ScoreConfig, samples: pl.DataFrame, report: Report = no_report
) -> pl.Series:
    """Σ_t log π(y_t | x, y_<t) in nats of each sample under one model, Float64; 0 for a response without a token.

    Args:
        folder: of the model, which is held for the next call (`held_model`).
        samples: `prompt_token_ids` and `token_ids`.
        report: receives notes of the scorer.

    Raises:
        DataError: as of `Scorer.sums`.
    """
    with timed("import"):
        from dice_py.scoring.scorer import Scorer

    scorer = Scorer(held_model(folder, models), config, report)
    prompts = list(token_arrays(samples, "prompt_token_ids", "the samples", scorer.shape.vocabulary))
    responses = list(token_arrays(samples, "token_ids", "the samples", scorer.shape.vocabulary))
    rows = [row for row, response in enumerate(responses) if len(response)]
    logps = [0.0] * len(responses)
    for row, logp in zip(rows, scorer.sums([prompts[r] for r in rows], [responses[r] for r in rows]), strict=True):
        logps[row] = logp
    return pl.Series("logp", logps, dtype=pl.Float64)
