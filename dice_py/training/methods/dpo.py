"""DPO: −log σ(β·Δ), Δ = [log π(y_w|x) − log π_ref(y_w|x)] − [log π(y_l|x) − log π_ref(y_l|x)].

Source: Rafailov et al., arXiv 2305.18290, eq. 7.
"""

from __future__ import annotations

import polars as pl

from dice_py.training.methods.base import Method, Settings, Terms


def _terms(pairs: pl.DataFrame, settings: Settings) -> Terms:
    del pairs, settings
    return {}


METHOD = Method("dpo", _terms)
