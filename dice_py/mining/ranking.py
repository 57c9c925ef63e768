"""Which responses mining may use, and the score by which it ranks them: the reward, corrected for length.

The extension computes both too, and keeps only the pairs. Here they are for people who look at all candidates of a
prompt.
"""

from __future__ import annotations

import math

import polars as pl

from dice_py.config.mining import MiningOptions
from dice_py.mining.columns import Frame, narrow_frame
from dice_py.mining.numeric import numeric_columns


def usable_responses(frame: Frame, options: MiningOptions) -> pl.DataFrame:
    """Rewards and lengths of all rows of what was mined, and which of them mining may use.

    Args:
        frame: what was mined, in any form that `mine_pairs` takes.
        options: as it was mined.

    Returns:
        `reward` f64 (rounded to float32, which the miner computes in), `length` i64 and `usable`, one row for each of
        `frame`. Responses of prompts with too few usable ones count as usable.

    Raises:
        UsageError, DataError: as `mine_pairs`.
    """
    rows, _ = numeric_columns(narrow_frame(frame, options), options)
    reward, length = pl.col("reward").cast(pl.Float32), pl.col("length").cast(pl.Int64)
    least = max(options.min_length or 0, 1 if options.debias == "per_token" else 0)
    usable = reward.is_finite() & (length >= least)
    if options.max_length is not None:
        usable &= length <= options.max_length
    if "truncated" in rows.columns:
        usable &= ~pl.col("truncated").fill_null(False)
    rows = rows.with_columns(reward=reward.cast(pl.Float64), length=length, usable=usable.fill_null(False))
    if "duplicate" in rows.columns:
        # Of a prompt's equal responses the first usable one counts.
        first = pl.struct("prompt", "duplicate", "usable").is_first_distinct()
        rows = rows.with_columns(pl.col("usable") & (first | pl.col("duplicate").is_null()))
    return rows.select("reward", "length", "usable")


def ranking_scores(frame: Frame, options: MiningOptions, alpha: float | None) -> pl.Series:
    """The score s of each response, as `mine_pairs` defines it for each `debias`.

    Args:
        frame, options: as of `usable_responses`.
        alpha: the penalty that mining found or was given (`MinedPairs.alpha`); read for `debias="linear"`.

    Returns:
        One f64 per row; null for responses that mining did not use (cut off, too short, a duplicate, …).

    Raises:
        UsageError, DataError: as `mine_pairs`.
    """
    rows = usable_responses(frame, options)
    score = _score(rows, options, alpha)
    return rows.select(pl.when("usable").then(score).alias("score")).to_series()


def _score(rows: pl.DataFrame, options: MiningOptions, alpha: float | None) -> pl.Expr:
    reward, length = pl.col("reward"), pl.col("length")
    if options.debias == "linear":
        return reward - (alpha or 0.0) * length
    if options.debias == "per_token":
        return reward / length
    if options.debias != "bucket":
        return reward
    bucket = _bucket(rows, options.buckets)
    of_used = pl.when("usable").then(reward)
    centered = reward - of_used.mean().over(bucket)
    if not options.bucket_scale:
        return centered
    spread = of_used.std(ddof=0).over(bucket)
    return pl.when(spread > 0).then(centered / spread).otherwise(centered)


def _bucket(rows: pl.DataFrame, buckets: int) -> pl.Expr:
    """The length quantile of each response: cut j is the length of rank ceil(j · n / buckets), closed on the right."""
    lengths = rows.filter("usable")["length"].sort()
    ranks = [math.ceil(j * len(lengths) / buckets) - 1 for j in range(1, buckets)] if len(lengths) else []
    cuts = lengths.gather(ranks).unique().sort()
    return pl.lit(cuts).search_sorted(pl.col("length"), side="left") if len(cuts) else pl.lit(0)
