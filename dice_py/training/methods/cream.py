"""CREAM: C·L(y_w, y_l) + (1 − C)·L(y_l, y_w).

C is the consistency of a ranking of a prompt's responses with a second one, (τ + 1)/2 with Kendall's τ: mining's column
`consistency` (mine.second_reward). The second ranking is that of the round before's reward, in round 1 that of the
reference's log-probabilities. C is the mean over the prompts of the round's mined pairs, or each prompt's own
(train.consistency). Replayed pairs of files are not the policy's own judgment, and have C = 1.

Source: Wang et al., arXiv 2410.12735, algorithm 1.
"""

from __future__ import annotations

import polars as pl

from dice_py.training.methods.base import Method, Settings, Terms, label_column


def _terms(pairs: pl.DataFrame, settings: Settings) -> Terms:
    if settings.config.consistency == "prompt":
        return {"label": label_column(pairs, "consistency", 1.0)}
    known = pairs.select("consistency", prompt=pl.col("prompt_ids").hash()).drop_nulls("consistency")
    # The rows keep one order, so that the mean does not depend on threads.
    mean = known.unique("prompt", keep="first", maintain_order=True)["consistency"].cast(pl.Float64).mean()
    label = pl.when(pl.col("consistency").is_null()).then(1.0).otherwise(pl.lit(mean, dtype=pl.Float64))
    return {"label": pairs.select(label=label).to_series()}


METHOD = Method("cream", _terms, ("consistency",))
