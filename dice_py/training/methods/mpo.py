"""MPO, stage 1: DPO on the easy pairs. Stage 2 is reinforcement learning on the hard prompts (stages/reinforce.py).

Easy and hard are mining's column `difficulty`: hard below mine.difficulty_quantile of the round's margins. Replayed
pairs of files have no margin, and are trained on here.

Source: Gou & Nguyen, arXiv 2403.19443, section 4.
"""

from __future__ import annotations

import polars as pl

from dice_py.training.methods.base import Method, Settings, Terms


def _terms(pairs: pl.DataFrame, settings: Settings) -> Terms:
    del pairs, settings
    return {}


METHOD = Method(
    "mpo", _terms, ("difficulty",), keeps=(pl.col("difficulty").cast(pl.String) != "hard").fill_null(value=True)
)
