"""SPA: (1 − ε)·L(y_w, y_l) + ε·L(y_l, y_w) for the pairs of least confidence, L(y_w, y_l) for the others.

The confidence of a pair is σ(margin) of rewards against the first reference (reward_reference=initial). The least
confident ones are those that mining labels hard (mine.difficulty_quantile, of all margins of the round); ε is
train.label_smoothing. Replayed pairs of files have no margin, and are not smoothed.

Source: Kim et al., arXiv 2406.04412, section 4.2; there the confidence is that of the policy in training, extrapolated.
"""

from __future__ import annotations

import polars as pl

from dice_py.config.loss import smoothing_of_spa
from dice_py.training.methods.base import Method, Settings, Terms


def _terms(pairs: pl.DataFrame, settings: Settings) -> Terms:
    hard = (pl.col("difficulty").cast(pl.String) == "hard").fill_null(False)
    label = pl.when(hard).then(1.0 - smoothing_of_spa(settings.config)).otherwise(1.0)
    return {"label": pairs.select(label=label).to_series()}


METHOD = Method("spa", _terms, ("difficulty",))
