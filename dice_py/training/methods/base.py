"""What a training method is: from the labels of the pairs to terms of each pair's loss.

The loss of a pair (x, y_w, y_l) is, with L the sum of TRL's loss types (config `train.loss`),

    w · [p · L(y_w, y_l) + (1 − p) · L(y_l, y_w)],      log-ratio of y = log π(y|x) − (log π_ref(y|x) + shift of y)

A method gives the shifts and the label p, and says which pairs are trained on; `train.weight_column` gives the weight
w (training/pair_terms.py). So the loss is TRL's own code for every method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import polars as pl

from dice_py.config.training import TrainConfig


@dataclass(frozen=True)
class Settings:
    """What terms are computed from, besides the pairs."""

    config: TrainConfig
    beta: float
    mined_alpha: float | None = None
    """Length penalty that mining found for these pairs, in reward per token; None: the training set names none."""


Terms = dict[str, pl.Series]
"""Some of `TERMS`, one number per pair."""

TERMS = ("chosen_shift", "rejected_shift", "label")
"""Shifts in nats (0 where absent); label: the probability that the chosen response is the better one (1)."""


@dataclass(frozen=True)
class Method:
    """One training method."""

    name: str
    terms: Callable[[pl.DataFrame, Settings], Terms]
    """From the training set, with the columns `labels`. Replayed pairs of files have null labels."""
    labels: tuple[str, ...] = ()
    """Columns of the training set that it reads, which mining adds."""
    keeps: pl.Expr | None = None
    """Which pairs are trained on, from the columns `labels`; None: all."""


def response_tokens(pairs: pl.DataFrame, side: str) -> pl.Series:
    """Tokens of the chosen or the rejected response, the stop token included, as float64."""
    return pairs[f"{side}_ids"].list.len().cast(pl.Float64)


def label_column(pairs: pl.DataFrame, name: str, missing: float) -> pl.Series:
    """A column of labels as float64, with `missing` for pairs that have none."""
    return pairs[name].cast(pl.Float64).fill_null(missing)
