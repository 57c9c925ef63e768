"""R-DPO, and iterative length-regularized DPO: −log σ(β·Δ + α(|y_w| − |y_l|)), lengths in tokens.

The policy that maximizes E[r(x, y) − α|y|] − β·KL(π ‖ π_ref) has r = β·log(π/π_ref) + α|y| + β·log Z(x), and in the
Bradley–Terry model of r the difference of two responses is β·Δ + α(|y_w| − |y_l|): the sign is plus. It is TRL's loss
with the reference's log-probabilities shifted by −α|y|/β.

Source: Park et al., arXiv 2403.19159, eq. 9; Liu et al., arXiv 2406.11817.
"""

from __future__ import annotations

import polars as pl

from dice_py.errors import UsageError
from dice_py.training.methods.base import Method, Settings, Terms, response_tokens


def _terms(pairs: pl.DataFrame, settings: Settings) -> Terms:
    alpha = settings.config.length_weight
    if alpha == "auto":
        if settings.mined_alpha is None:
            raise UsageError(
                "train.length_weight is auto, but the training set names no penalty per token that mining found "
                "(debias=linear, with lengths in tokens): mine so, and make the training set again, or set "
                "train.length_weight to a number"
            )
        alpha = settings.mined_alpha
    return {f"{side}_shift": response_tokens(pairs, side) * (-alpha / settings.beta) for side in ("chosen", "rejected")}


METHOD = Method("rdpo", _terms)
