"""Columns and thresholds that pairs get after they are picked: policies, soft labels, difficulty, least margins.

`mine_pairs` applies them to all pairs at once, and streaming.py to one segment after another.
"""

from __future__ import annotations

import math

import polars as pl

from dice_py.config.mining import MiningOptions

QUANTILES = {"min": 0.0, "0.05": 0.05, "0.25": 0.25, "0.5": 0.5, "0.75": 0.75, "0.95": 0.95, "max": 1.0}
"""The quantiles of the margins that summaries list, by name."""


def add_policies(pairs: pl.DataFrame, policies: pl.Series) -> pl.DataFrame:
    """Adds `chosen_policy` and `rejected_policy`, from the policy of every row of the frame."""
    return pairs.with_columns(policies.gather(pairs[f"{s}_row"]).alias(f"{s}_policy") for s in ("chosen", "rejected"))


def apply_margin_options(pairs: pl.DataFrame, options: MiningOptions) -> pl.DataFrame:
    """Applies the options that need only each pair's own margin: drops pairs below `min_margin`, adds `soft_label`."""
    if options.min_margin is not None:
        pairs = drop_below(pairs, options.min_margin)
    if options.soft_labels:
        margin = pl.col("margin").cast(pl.Float64)
        label = 1.0 / (1.0 + (-margin / options.label_scale).exp())
        pairs = pairs.with_columns(label.cast(pl.Float32).alias("soft_label"))
    return pairs


def drop_below(pairs: pl.DataFrame, least: float) -> pl.DataFrame:
    """The pairs with a margin of at least `least`."""
    return pairs.filter(pl.col("margin").cast(pl.Float64) >= least)


def least_easy_margin(margins: pl.Series, share: float) -> float:
    """The margin from which pairs are easy: the quantile `share` of all margins; of a share of 1, none is."""
    return math.inf if share == 1 else quantile(margins, share)


def add_difficulty(pairs: pl.DataFrame, least_easy: float) -> pl.DataFrame:
    """Adds `difficulty`: "hard" for margins below `least_easy`, else "easy"."""
    hard = pl.when(pl.col("margin").cast(pl.Float64) < least_easy).then(pl.lit("hard")).otherwise(pl.lit("easy"))
    return pairs.with_columns(hard.cast(pl.Enum(["easy", "hard"])).alias("difficulty"))


def quantile(values: pl.Series, q: float) -> float:
    """A quantile by linear interpolation, in float64; NaN of no values."""
    value = values.cast(pl.Float64).quantile(q, interpolation="linear")
    return math.nan if value is None else float(value)


def margin_quantiles(margins: pl.Series) -> dict[str, float]:
    """Every quantile of `QUANTILES`; NaN without margins."""
    ascending = margins.cast(pl.Float64).sort()
    return {name: quantile(ascending, q) for name, q in QUANTILES.items()}


def finite(value: float | None) -> float | None:
    """The number if JSON can hold it; None for NaN and infinities."""
    return value if value is not None and math.isfinite(value) else None


def alpha_per_token(options: MiningOptions, alpha: float | None) -> dict[str, float | None]:
    """The footer's entry of a file of pairs for R-DPO: the penalty in reward per token, or null where it is of none.

    Lengths are in tokens if they are of the column `response_tokens`.
    """
    is_one = options.debias == "linear" and options.length_column == "response_tokens"
    return {"alpha_per_token": finite(alpha) if is_one else None}
