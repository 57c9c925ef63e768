"""The score by which mining ranks each response: its reward, corrected for length.

The extension computes it too, and keeps only the pairs. Here it is for people who look at all candidates of a prompt.
"""

from __future__ import annotations

import math

import polars as pl

from dice_py.config.mining import MiningOptions
from dice_py.mining.columns import Frame, narrow_frame
from dice_py.mining.numeric import numeric_columns

_USED = "\0used"


def ranking_scores(frame: Frame, options: MiningOptions, alpha: float | None) -> pl.Series:
    """The score s of each response, as `mine_pairs` defines it for each `debias`.

    Args:
        frame: what was mined, in any form that `mine_pairs` takes.
        options: as it was mined.
        alpha: the penalty that mining found or was given (`MinedPairs.alpha`); read for `debias="linear"`.

    Returns:
        One f64 per row; null for responses that mining did not use (cut off, too short, a duplicate, …). Those of
        prompts with too few responses have one.

    Raises:
        UsageError, DataError: as `mine_pairs`.
    """
    rows, _ = numeric_columns(narrow_frame(frame, options), options)
    rows = rows.select("prompt", pl.col("length").cast(pl.Int64), pl.col("reward").cast(pl.Float64), *_further(rows))
    rows = rows.with_columns(_usable(rows, options).alias(_USED))
    if options.duplicate_column is not None:
        # Of equal responses the first one counts, if it is usable at all.
        number = pl.int_range(pl.len())
        first = number == number.filter(_USED).min().over("prompt", "duplicate")
        rows = rows.with_columns((pl.col(_USED) & (pl.col("duplicate").is_null() | first)).alias(_USED))
    score = _score(rows, options, alpha)
    return rows.select(pl.when(_USED).then(score).alias("score")).to_series()


def _further(rows: pl.DataFrame) -> list[str]:
    return [name for name in ("truncated", "duplicate") if name in rows.columns]


def _usable(rows: pl.DataFrame, options: MiningOptions) -> pl.Expr:
    """Whether a response is usable, before duplicates are looked at."""
    least = max(options.min_length or 0, 1 if options.debias == "per_token" else 0)
    # A reward is finite if it is so in float32, which the extension computes in.
    usable = pl.col("reward").cast(pl.Float32, strict=False).is_finite() & (pl.col("length") >= least)
    if options.max_length is not None:
        usable &= pl.col("length") <= options.max_length
    if "truncated" in rows.columns:
        usable &= ~pl.col("truncated").fill_null(False)
    return usable.fill_null(False)


def _score(rows: pl.DataFrame, options: MiningOptions, alpha: float | None) -> pl.Expr:
    reward, length = pl.col("reward"), pl.col("length")
    if options.debias == "linear":
        return reward - (alpha or 0.0) * length
    if options.debias == "per_token":
        return reward / length
    if options.debias != "bucket":
        return reward
    bucket = _bucket(rows, options.buckets)
    of_used = reward.filter(_USED)
    centered = reward - of_used.mean().over(bucket)
    if not options.bucket_scale:
        return centered
    spread = of_used.std(ddof=0).over(bucket)
    return pl.when(spread > 0).then(centered / spread).otherwise(centered)


def _bucket(rows: pl.DataFrame, buckets: int) -> pl.Expr:
    """The length quantile of each response: cut j is the length of rank ceil(j · n / buckets), closed on the right."""
    lengths = rows.filter(_USED)["length"].sort()
    ranks = [math.ceil(j * len(lengths) / buckets) - 1 for j in range(1, buckets)] if len(lengths) else []
    cuts = lengths.gather(ranks).unique().sort()
    return pl.lit(cuts).search_sorted(pl.col("length"), side="left") if len(cuts) else pl.lit(0)
