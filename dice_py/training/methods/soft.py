"""Soft labels, conservative DPO: p·L(y_w, y_l) + (1 − p)·L(y_l, y_w), p the probability that y_w is the better one.

p is mining's column `soft_label`, σ(margin / mine.label_scale). Replayed pairs of files have p = 1.

Source: Mitchell, "A note on DPO with noisy preferences and relationship to IPO" (2023), with a label for each pair.
"""

from __future__ import annotations

import polars as pl

from dice_py.training.methods.base import Method, Settings, Terms, label_column


def _terms(pairs: pl.DataFrame, settings: Settings) -> Terms:
    del settings
    return {"label": label_column(pairs, "soft_label", 1.0)}


METHOD = Method("soft", _terms, ("soft_label",))
