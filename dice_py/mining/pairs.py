"""`mine_pairs`: from scored responses to pairs of a chosen and a rejected response, without the length bias.

Rust picks the pairs (rust/dice-core). This file passes the numeric columns to the extension and builds a frame from
its answer. What depends on all pairs at once (thresholds by quantile, labels from margins) is done with Polars. Only
numbers cross the boundary: pairs carry row numbers, and `attach_text` gathers the text.

The penalty (`debias="linear"`): among a prompt's responses, the chosen one has the greatest and the rejected one the
least `reward - alpha * length`. With `alpha="auto"`, alpha is the value at which the mean of chosen length - rejected
length is nearest zero (DICE, arXiv 2406.09760, section 4.2). It is found exactly, from the break points of that step
function, and not on a grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Unpack

import polars as pl

from dice_py import _native
from dice_py.config.mining import MiningKeywords, MiningOptions
from dice_py.mining.columns import Frame, arrow_frame, column_names, narrow_frame
from dice_py.mining.labels import (
    add_difficulty,
    add_policies,
    apply_margin_options,
    drop_below,
    finite,
    least_easy_margin,
    margin_quantiles,
    quantile,
)
from dice_py.mining.numeric import numeric_columns
from dice_py.mining.options import native_keywords, read_options, with_mining_signature


@dataclass(frozen=True)
class MinedPairs:
    """The pairs that `mine_pairs` returns, the penalty, and counts of everything that was dropped."""

    pairs: pl.DataFrame
    """One row per pair, by ascending prompt: `prompt_id` (in the frame's own dtype), `chosen_row u64`,
    `rejected_row u64` (row numbers of the frame, from zero), `chosen_reward f32`, `rejected_reward f32` (as in the
    frame), `margin f32` (chosen score - rejected score; a score is the reward after debiasing), `chosen_length u32`,
    `rejected_length u32`; then, where the options ask for them, `chosen_win_rate f32`, `rejected_win_rate f32`,
    `consistency f32`, `chosen_policy`, `rejected_policy`, `soft_label f32`, `difficulty enum`."""
    alpha: float | None
    """The penalty per unit of length, in units of reward; 0.0 for `debias="none"`; None for `debias` other than "none"
    and "linear"."""
    alpha_low: float | None
    """The least penalty with the same best and worst response of every prompt."""
    alpha_high: float | None
    """The penalty from which on one of them differs; infinity if there is none."""
    mean_length_gap_before: float
    """Mean of best length - worst length by reward alone, over prompts where one response beats another (of equal
    rewards, the shortest best and the longest worst, as the least penalty has them); NaN without such prompts."""
    mean_length_gap_after: float
    """Mean of chosen length - rejected length over the pairs; NaN without pairs."""
    reward_length_correlation_before: float
    """Pearson's correlation of reward and length over the usable responses (including those of prompts with too few
    of them), to nine decimals; NaN if one of the two is constant."""
    reward_length_correlation_after: float
    """The same for score and length."""
    dropped: dict[str, int]
    """Dropped rows, each under the first reason that applies: `null`, `not_finite`, `truncated`, `too_short`,
    `too_long`, `duplicate`, `too_few_responses`."""
    dropped_prompts: dict[str, int]
    """Prompts without a pair: `too_few_responses`; `tied` (the responses that could make a pair have equal rewards);
    `no_contrast` (no response that may be chosen beats one that may be rejected); `no_match` ("matched": no two of
    nearly equal length)."""
    dropped_pairs: dict[str, int]
    """Pairs that were left out: `tied` ("top_bottom" and "all_pairs": of equal rewards, which are no preference); under
    a threshold: `below_min_margin`, then `below_quantile`."""
    prompts: int
    """Prompts in the frame."""
    rows: int
    """Rows in the frame."""
    curve: pl.DataFrame
    """The mean length gap as a function of the penalty, at about 200 of its steps around `alpha`, at most: `alpha f64`,
    `mean_length_gap f64` (from that alpha to the next step), `exact bool` (False: of a sample of the prompts, far from
    the chosen `alpha`). Empty without a linear penalty."""

    @property
    def chosen_longer_share(self) -> float:
        """Share of the pairs whose chosen response is the longer one; NaN without pairs."""
        return _mean(self.pairs.select((pl.col("chosen_length") > pl.col("rejected_length")).mean()))

    @cached_property
    def margin_quantiles(self) -> dict[str, float]:
        """Quantiles of the pairs' margins (linear interpolation), from `min` to `max`; NaN without pairs."""
        return margin_quantiles(self.pairs["margin"])

    @property
    def mean_consistency(self) -> float | None:
        """Mean of `consistency` over the prompts with a pair, nulls left out; None without a second reward."""
        if "consistency" not in self.pairs.columns:
            return None
        # The rows keep one order, so that the sum does not depend on threads.
        by_prompt = self.pairs.unique("prompt_id", keep="first", maintain_order=True)
        return _mean(by_prompt.select(pl.col("consistency").cast(pl.Float64).mean()))

    def summary(self) -> dict[str, Any]:
        """Everything but the frames, ready for JSON (infinities and NaN become None)."""
        return {
            "pairs": self.pairs.height,
            **{name: finite(getattr(self, name)) for name in ("alpha", "alpha_low", "alpha_high")},
            "mean_length_gap_before": finite(self.mean_length_gap_before),
            "mean_length_gap_after": finite(self.mean_length_gap_after),
            "chosen_longer_share": finite(self.chosen_longer_share),
            "reward_length_correlation_before": finite(self.reward_length_correlation_before),
            "reward_length_correlation_after": finite(self.reward_length_correlation_after),
            "margin_quantiles": {name: finite(value) for name, value in self.margin_quantiles.items()},
            "mean_consistency": finite(self.mean_consistency),
            "dropped": dict(self.dropped),
            "dropped_prompts": dict(self.dropped_prompts),
            "dropped_pairs": dict(self.dropped_pairs),
            "prompts": self.prompts,
            "rows": self.rows,
        }


def _mean(frame: pl.DataFrame) -> float:
    value = frame.item()
    return math.nan if value is None else float(value)


@with_mining_signature
def mine_pairs(frame: Frame, options: MiningOptions | None = None, **keywords: Unpack[MiningKeywords]) -> MinedPairs:
    """Mines pairs of a better and a worse response of each prompt, corrected for length bias.

    Args:
        frame: one row per response, in any order: a Polars DataFrame or LazyFrame (only the columns named by the
            options are collected), a pyarrow Table or RecordBatchReader, or anything with `__arrow_c_stream__`. Its
            columns: prompt (integers, text, or anything with an order; no nulls), reward (numbers), length (integers,
            in tokens or characters).
        options: all options as one object, in place of keywords.
        **keywords: single options, explained below; their defaults are in the signature.

    Returns:
        The pairs (as row numbers of `frame`), the penalty, and counts of everything that was dropped.

    Raises:
        UsageError: an option of the wrong type or out of its range, or `frame` is not a table.
        DataError: a missing or unsuitable column, a null prompt or policy, a negative length, or no rows.
        TypeError: an unknown keyword.

    **Usable responses** have a length and a reward that is finite in float32, are not truncated, and have
    `min_length <= length <= max_length`. A prompt needs `min_responses` of them. Empty responses (length 0, or 0
    in a column `response_chars`, which `dice generate` writes: the stop token counts as one of their tokens) are used
    only with `min_length` 0 or None.

    - `truncated_column`: a boolean column, true for responses cut off by the token limit; these are dropped. "auto"
      means `finish_reason`, if the frame has such a column: "length", or what other servers call it ("max_tokens",
      "FinishReason.LENGTH", a struct with the field `type`); None drops none.
    - `duplicate_column`: text, lists of token ids (both hashed to 64 bits), or integers. Of a prompt's usable responses
      with equal values, only the first counts. A null equals nothing.

    **The score** s of a response with reward r and length l depends on `debias`:

    | `debias` | s | |
    | --- | --- | --- |
    | "none" | r | |
    | "linear" | r - alpha * l | `alpha`: a number of zero or more, or "auto" |
    | "per_token" | r / l | responses of length 0 count as too short |
    | "bucket" | r - mean, or (r - mean) / std with `bucket_scale` | mean and std of the length quantile |
    | "matched" | r | only pairs of nearly equal length |

    - "auto" is the alpha at which the mean length gap of each prompt's best and worst response is nearest zero,
      whatever the `pairing`, over the prompts with different rewards. It is 0 if no penalty is best, else the middle of
      `alpha_low` and `alpha_high`; every penalty between these two picks the same responses. If two penalties leave
      gaps of the same size on both sides of zero, the lower one is used.
    - "bucket": mean and population standard deviation over all usable responses in the same of `buckets` length
      quantiles. Cut j is the length of rank ceil(j * n / buckets), closed on the right, so equal lengths share a
      bucket. Responses of prompts with fewer than `min_responses` count here too. A bucket with std = 0 is not divided.
    - "matched": the pair of the greatest margin among all whose lengths differ by at most `length_tolerance`, or by at
      most `length_ratio` of the longer one. At equal margins the least difference wins, then the least hash (below).

    **The pairs** of a prompt depend on `pairing`. Two responses of equal reward r are no preference: they never form a
    pair, whatever their s. "Best first" orders by s, descending; at equal s but different r (only debiasing makes such
    ties) the shorter response comes first. "Worst first" orders by s, ascending; at equal s but different r the longer
    one comes first. At equal s and equal r a hash of (`seed`, prompt, row) decides in both orders, since the shorter or
    the first would be a bias. One response beats another if its r is another and its s is higher, or equal while it is
    shorter. The chosen response of a pair always beats the rejected one.

    The hash is m(m(m(seed) ^ prompt) ^ row) with m = splitmix64 (Steele et al. 2014); the least is taken. `prompt` is
    the id as a 64-bit number (for ids that are no integers: its rank among those of the frame, from 1), `row` counts
    the prompt's own rows from zero, in the order of the frame. So the choice depends neither on chunks, files and
    segments nor on the other prompts (of integer ids).

    | `pairing` | pairs |
    | --- | --- |
    | "max_min" | the best and the worst (DICE) |
    | "max_random" | the best and one of those it beats, drawn by `seed` and prompt |
    | "top_bottom" | the `top_k` best with the `bottom_k` worst, greatest margins first, at most `pairs_per_prompt` |
    | "max_sweet_spot" | the best and the one nearest mean - `sweet_spot_deviations` * std of the prompt's s |
    | "all_pairs" | all, greatest margins first, at most `pairs_per_prompt` |

    If a penalty makes two responses of equal r the best and the worst, "max_min" takes the pair of the greatest margin
    among those of different r. "max_sweet_spot" is from Xiao et al., arXiv 2502.16825; std is the population's. The
    number of "all_pairs" grows with the square of a prompt's responses.

    - `policy_column`: the policy (or round) that sampled the response; a greater value is newer. `chosen_from` and
      `rejected_from` restrict that side to the "newest" or "oldest" policy among the prompt's usable responses.
    - `min_margin`: pairs of a smaller margin (as stored, in float32) are dropped. After that, `min_margin_quantile`
      drops pairs below that quantile of the remaining margins.

    **Labels** are further columns of the pairs:

    - `win_rates`: SPPO's P of chosen and rejected (Wu et al., arXiv 2405.00675): the mean of
      sigmoid((s_i - s_j) / label_scale) over the prompt's usable responses j.
    - `soft_labels`: sigmoid(margin / label_scale).
    - `difficulty_quantile`: "hard" for pairs with a margin below that quantile (1: for all), else "easy" (MPO, arXiv
      2403.19443).
    - `second_reward_column`: `consistency`, (tau + 1) / 2 with Kendall's tau of the reward and a second reward over the
      prompt's responses (CREAM, arXiv 2410.12735). Ties count for neither side; null for fewer than two responses.

    The pairs depend neither on chunks or threads nor on the order of rows, except that of responses of equal reward.

    Example:
        >>> import polars as pl
        >>> scored = pl.DataFrame({
        ...     "prompt_id": [1, 1, 1, 2, 2, 2],
        ...     "reward": [0.9, 0.8, 0.1, 0.4, 0.7, 0.2],
        ...     "response_tokens": [90, 40, 35, 10, 60, 30],
        ... })
        >>> mined = mine_pairs(scored, alpha=0.01)
        >>> mined.pairs.select("prompt_id", "chosen_row", "rejected_row", "margin")
        shape: (2, 4)
        ┌───────────┬────────────┬──────────────┬────────┐
        │ prompt_id ┆ chosen_row ┆ rejected_row ┆ margin │
        │ ---       ┆ ---        ┆ ---          ┆ ---    │
        │ i64       ┆ u64        ┆ u64          ┆ f32    │
        ╞═══════════╪════════════╪══════════════╪════════╡
        │ 1         ┆ 1          ┆ 2            ┆ 0.65   │
        │ 2         ┆ 3          ┆ 5            ┆ 0.4    │
        └───────────┴────────────┴──────────────┴────────┘
        >>> mined.mean_length_gap_before, mined.mean_length_gap_after
        (42.5, -7.5)
    """
    options = read_options("mine_pairs", options, keywords)
    narrow = narrow_frame(frame, options)
    return mine_columns(narrow, numeric_columns(narrow, options), options)


def mine_columns(narrow: pl.DataFrame, numeric: tuple[pl.DataFrame, bool], options: MiningOptions) -> MinedPairs:
    """`mine_pairs` on columns that were read before, so that several minings can share them.

    Args:
        narrow: of `narrow_frame`.
        numeric: of `numeric_columns`.
    """
    numbers, integer_prompts = numeric
    with column_names(options):
        # A struct column is exported chunk by chunk. The frame's own export would join (copy) the chunks first.
        reader, summary = _native.mine(numbers.to_struct("rows"), native_keywords(options))
    pairs = arrow_frame(reader.read_all())
    if integer_prompts:
        prompts = pairs["prompt"].alias("prompt_id")
    else:
        prompts = narrow[options.prompt_column].gather(pairs["chosen_row"]).alias("prompt_id")
    pairs = pairs.drop("prompt").insert_column(0, prompts)
    if options.policy_column is not None:
        pairs = add_policies(pairs, narrow[options.policy_column])
    return _mined_pairs(pairs, summary, options)


def _mined_pairs(pairs: pl.DataFrame, summary: _native.MineSummary, options: MiningOptions) -> MinedPairs:
    """The result: pairs under a threshold dropped, labels added, numbers of the extension named."""
    count = pairs.height
    pairs = apply_margin_options(pairs, options)
    dropped_pairs = {"tied": summary.tied_pairs, "below_min_margin": count - pairs.height, "below_quantile": 0}
    if options.min_margin_quantile is not None:
        kept = drop_below(pairs, quantile(pairs["margin"], options.min_margin_quantile))
        dropped_pairs["below_quantile"] = pairs.height - kept.height
        pairs = kept
    if options.difficulty_quantile is not None:
        pairs = add_difficulty(pairs, least_easy_margin(pairs["margin"], options.difficulty_quantile))
    gap = summary.mean_length_gap_after
    if pairs.height != count:
        longer = pl.col("chosen_length").cast(pl.Int64) - pl.col("rejected_length").cast(pl.Int64)
        gap = _mean(pairs.select(longer.mean()))
    return MinedPairs(
        pairs=pairs,
        alpha=summary.alpha,
        alpha_low=summary.alpha_low,
        alpha_high=summary.alpha_high,
        mean_length_gap_before=summary.mean_length_gap_before,
        mean_length_gap_after=gap,
        reward_length_correlation_before=summary.correlation_before,
        reward_length_correlation_after=summary.correlation_after,
        dropped=dict(summary.dropped),
        dropped_prompts=dict(summary.dropped_prompts),
        dropped_pairs=dropped_pairs,
        prompts=summary.prompts,
        rows=summary.rows,
        curve=curve_of(summary),
    )


def curve_of(summary: _native.MineSummary) -> pl.DataFrame:
    """The curve of `MinedPairs`."""
    return pl.DataFrame(
        {"alpha": summary.curve_alpha, "mean_length_gap": summary.curve_gap, "exact": summary.curve_exact},
        schema={"alpha": pl.Float64, "mean_length_gap": pl.Float64, "exact": pl.Boolean},
    )
