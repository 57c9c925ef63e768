"""SPPO, with soft labels: (log π_w/π_t − (P̂_w − ½)/β)² + (log π_l/π_t − (P̂_l − ½)/β)².

P̂ is a response's estimated probability of winning against the prompt's other responses (mine.win_rates). It is TRL's
`sppo_hard`, which has P̂_w = 1 and P̂_l = 0, with the reference's log-probabilities shifted by −(1 − P̂_w)/β and +P̂_l/β.
Replayed pairs of files have no win rates, and are trained on with the hard ones.

Source: Wu et al., arXiv 2405.00675, eq. 4.7 (η there is 1/β).
"""

from __future__ import annotations

import polars as pl

from dice_py.training.methods.base import Method, Settings, Terms, label_column


def _terms(pairs: pl.DataFrame, settings: Settings) -> Terms:
    return {
        "chosen_shift": (label_column(pairs, "chosen_win_rate", 1.0) - 1.0) / settings.beta,
        "rejected_shift": label_column(pairs, "rejected_win_rate", 0.0) / settings.beta,
    }


METHOD = Method("sppo", _terms, ("chosen_win_rate", "rejected_win_rate"))
