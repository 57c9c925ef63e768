"""Mine preference pairs: the best and the worst response of each prompt, less a length penalty.

The work is Rust's (rust/dice-core). This file names the columns and turns the answer into a frame; what concerns all
pairs at once (thresholds by quantile, labels of their margins) is Polars'. Only numbers cross: the pairs carry row
numbers, and `attach_text` gathers the text.

The penalty (`debias="linear"`): of one prompt's responses, the chosen has the greatest and the rejected the
least `reward - alpha * length`. With `alpha="auto"`, alpha is the one at which the mean of chosen length -
rejected length is nearest zero (DICE, arXiv 2406.09760, section 4.2), found exactly from the break points of
that step function, not on a grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import polars as pl

from dice_py import _native
from dice_py.config.mining import Debias, MineOptions, Pairing, PickFrom
from dice_py.errors import DataError
from dice_py.mining.columns import Frame, arrow_frame, narrow_frame, numeric_columns

QUANTILES = {"min": 0.0, "0.05": 0.05, "0.25": 0.25, "0.5": 0.5, "0.75": 0.75, "0.95": 0.95, "max": 1.0}


@dataclass(frozen=True)
class MinedPairs:
    """What `mine_pairs` found, kept and dropped."""

    pairs: pl.DataFrame
    """One row a pair, by ascending prompt: `prompt_id` (the frame's own dtype), `chosen_row u64`,
    `rejected_row u64` (row numbers of the frame, from zero), `chosen_reward f32`, `rejected_reward f32` (as
    they were), `margin f32` (difference of the scores: of the rewards after debiasing), `chosen_length u32`,
    `rejected_length u32`; then, where they were asked for, `chosen_win_rate f32`, `rejected_win_rate f32`,
    `soft_label f32`, `difficulty enum`, `consistency f32`, `chosen_policy`, `rejected_policy`."""
    alpha: float | None
    """The penalty per unit of length, in units of reward; None for `debias` other than "none" and "linear"."""
    alpha_low: float | None
    """The least penalty with the same best and worst response of every prompt."""
    alpha_high: float | None
    """The penalty from which on one of them differs; infinity if there is none."""
    mean_length_gap_before: float
    """Mean of |best| - |worst| by reward alone, over prompts where one beats the other; NaN without any."""
    mean_length_gap_after: float
    """Mean of chosen length - rejected length of the pairs; NaN if there are none."""
    reward_length_correlation_before: float
    """Pearson's correlation of reward and length over the usable responses, those of prompts with too few of them
    included, to nine decimals; NaN if one of them is constant."""
    reward_length_correlation_after: float
    """The same of score and length."""
    dropped: dict[str, int]
    """Rows that were dropped, each under the first reason that applies: `null`, `not_finite`, `truncated`,
    `too_short`, `too_long`, `duplicate`, `too_few_responses`."""
    dropped_prompts: dict[str, int]
    """Prompts that gave no pair: `too_few_responses`; `no_contrast` (none that may be chosen beats one that may be
    rejected); `no_match` ("matched": no two of nearly equal length)."""
    dropped_pairs: dict[str, int]
    """Pairs under a threshold: `below_min_margin`, then `below_quantile`."""
    prompts: int
    """Prompts in the frame."""
    rows: int
    """Rows in the frame."""
    curve: pl.DataFrame
    """The mean length gap as a function of the penalty, at some hundred of its steps around the answer: `alpha f64`,
    `mean_length_gap f64` (from that alpha to the next step), `exact bool` (False: of a sample of the prompts, far
    from the answer). Empty without a linear penalty."""

    @property
    def chosen_longer_share(self) -> float:
        """Share of the pairs whose chosen response is the longer one; NaN if there are none."""
        return _mean(self.pairs.select((pl.col("chosen_length") > pl.col("rejected_length")).mean()))

    @cached_property
    def margin_quantiles(self) -> dict[str, float]:
        """Quantiles of the pairs' margins (linear interpolation), from `min` to `max`; NaN without pairs."""
        return margin_quantiles(self.pairs["margin"])

    @property
    def mean_consistency(self) -> float | None:
        """Mean of `consistency` over the prompts that gave a pair and have one; None without a second reward."""
        if "consistency" not in self.pairs.columns:
            return None
        # In one order, so that the sum does not depend on threads.
        by_prompt = self.pairs.unique("prompt_id", keep="first", maintain_order=True)
        return _mean(by_prompt.select(pl.col("consistency").cast(pl.Float64).mean()))

    def summary(self) -> dict[str, Any]:
        """Everything but the frames, ready for JSON (infinity and NaN become None)."""
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


def finite(value: float | None) -> float | None:
    """The number, if JSON has a word for it."""
    return value if value is not None and math.isfinite(value) else None


def _mean(frame: pl.DataFrame) -> float:
    value = frame.item()
    return math.nan if value is None else float(value)


def margin_quantiles(margins: pl.Series) -> dict[str, float]:
    """`MinedPairs.margin_quantiles` of some margins."""
    ascending = margins.cast(pl.Float64).sort()
    return {name: quantile(ascending, q) for name, q in QUANTILES.items()}


def quantile(values: pl.Series, q: float) -> float:
    """A quantile by linear interpolation; NaN of no values."""
    found = values.cast(pl.Float64).quantile(q, interpolation="linear")
    return math.nan if found is None else float(found)


def mine_pairs(
    frame: Frame,
    *,
    prompt_column: str = "prompt_id",
    reward_column: str = "reward",
    length_column: str = "response_tokens",
    truncated_column: str | None = "auto",
    debias: Debias = "linear",
    alpha: float | Literal["auto"] = "auto",
    buckets: int = 10,
    bucket_scale: bool = False,
    length_tolerance: int | None = None,
    length_ratio: float | None = None,
    pairing: Pairing = "max_min",
    top_k: int = 2,
    bottom_k: int = 2,
    pairs_per_prompt: int | None = None,
    sweet_spot_deviations: float = 2.0,
    seed: int = 0,
    min_margin: float | None = None,
    min_margin_quantile: float | None = None,
    min_responses: int = 2,
    min_length: int | None = None,
    max_length: int | None = None,
    duplicate_column: str | None = None,
    policy_column: str | None = None,
    chosen_from: PickFrom = "any",
    rejected_from: PickFrom = "any",
    second_reward_column: str | None = None,
    win_rates: bool = False,
    soft_labels: bool = False,
    label_scale: float = 1.0,
    difficulty_quantile: float | None = None,
) -> MinedPairs:
    """Pairs of a better and a worse response of each prompt, less the length bias.

    `frame` has one row a response, in any order: a Polars DataFrame or LazyFrame (of which only the columns
    named here are collected), a pyarrow Table or RecordBatchReader, or anything with `__arrow_c_stream__`.
    Its columns: prompt (integers, text, or anything with an order; no nulls), reward (a number), length (a
    whole number, in tokens or characters).

    **Usable responses** have a reward and a length, the reward finite (in float32), are not truncated, and have
    `min_length <= length <= max_length`; a prompt needs `min_responses` of them.

    - `truncated_column`: a boolean column of responses cut off by the token limit, which are dropped. "auto"
      takes `finish_reason == "length"` where there is a column `finish_reason`; None drops none.
    - `duplicate_column`: text, lists of token ids (both hashed to 64 bits), or integers. Usable responses of a prompt
      with equal values count once: the first one. Nulls equal nothing.

    **The score** s of a response of reward r and length l, by `debias`:

    | `debias` | s | |
    | --- | --- | --- |
    | "none" | r | |
    | "linear" | r - alpha * l | `alpha`: a number of zero or more, or "auto" |
    | "per_token" | r / l | responses of length 0 are too short |
    | "bucket" | r - mean, or (r - mean) / std with `bucket_scale` | of its length quantile |
    | "matched" | r | pairs of nearly equal length only |

    - "auto" is the alpha at which the mean length gap of each prompt's best and worst response is nearest zero,
      whatever the `pairing`. It is 0 if no penalty is best, else the middle of `alpha_low` and `alpha_high`, all
      floats between which give the same responses. If two penalties leave gaps of the same size on both sides of
      zero, the lower is taken.
    - "bucket": mean and population standard deviation over all usable responses in the same of `buckets` length
      quantiles (cut j at the length of rank ceil(j * n / buckets), closed on the right; equal lengths share a bucket;
      responses count here whatever `min_responses` says; std = 0 does not divide).
    - "matched": the pair of the greatest margin of all whose lengths differ by at most `length_tolerance`, or by at
      most `length_ratio` of the longer one; then of the least difference, then the lowest rows.

    **The pairs** of a prompt, by `pairing`. Best first is the order of s; at equal s the shorter response comes first,
    then the higher reward, then the lower row. Worst first is the opposite (but lower rows first). One response beats
    another if it comes before it best first for more than its row; a pair is always of a response and one it beats.

    | `pairing` | pairs |
    | --- | --- |
    | "max_min" | the best and the worst (DICE) |
    | "max_random" | the best and one of those it beats, drawn by `seed` and prompt |
    | "top_bottom" | the `top_k` best with the `bottom_k` worst, greatest margins first, at most `pairs_per_prompt` |
    | "max_sweet_spot" | the best and the one nearest mean - `sweet_spot_deviations` * std of the prompt's s |
    | "all_pairs" | all, greatest margins first, at most `pairs_per_prompt` |

    "max_sweet_spot" is of Xiao et al., arXiv 2502.16825; std is the population's. "all_pairs" grows with the square of
    a prompt's responses.

    - `policy_column`: which policy (or round) sampled the response, greater being newer. `chosen_from` and
      `rejected_from` hold that side to the "newest" or "oldest" policy among the prompt's usable responses.
    - `min_margin`: pairs of a smaller margin (as it is stored, in float32) are dropped; then, by
      `min_margin_quantile`, those below that quantile of the margins that are left.

    **Labels**, as further columns of the pairs:

    - `win_rates`: SPPO's P of chosen and rejected (Wu et al., arXiv 2405.00675): the mean of
      sigmoid((s_i - s_j) / label_scale) over the prompt's usable responses j.
    - `soft_labels`: sigmoid(margin / label_scale).
    - `difficulty_quantile`: "hard" for pairs with a margin below that quantile, else "easy" (MPO, arXiv 2403.19443).
    - `second_reward_column`: `consistency`, (tau + 1) / 2 of the prompt's responses with Kendall's tau of the reward
      and a second one (CREAM, arXiv 2410.12735); ties count for neither, null for fewer than two responses.

    The pairs depend neither on the order of rows (but for responses equal in reward and length), nor on chunks or
    threads.

    Raises UsageError for an option out of range, and DataError for a missing or unsuitable column, a null
    prompt or policy, a negative length, or a frame without rows.
    """
    given = {name: value for name, value in locals().items() if name != "frame"}
    return _mine(frame, MineOptions(**given))


def _mine(frame: Frame, options: MineOptions) -> MinedPairs:
    narrow = narrow_frame(frame, options)
    numbers, native_key = numeric_columns(narrow, options)
    with column_names(options):
        # As one struct column the chunks are exported as they are. A frame's own export joins them first.
        reader, found = _native.mine(numbers.to_struct("rows"), options.native())
    pairs = arrow_frame(reader.read_all())
    if native_key:
        prompts = pairs["prompt"].alias("prompt_id")
    else:
        prompts = narrow[options.prompt_column].gather(pairs["chosen_row"]).alias("prompt_id")
    pairs = pairs.drop("prompt").insert_column(0, prompts)
    if options.policy_column is not None:
        pairs = add_policies(pairs, narrow[options.policy_column])
    count = pairs.height
    pairs = with_margin(pairs, options)
    dropped_pairs = {"below_min_margin": count - pairs.height, "below_quantile": 0}
    if options.min_margin_quantile is not None:
        kept = above(pairs, quantile(pairs["margin"], options.min_margin_quantile))
        dropped_pairs["below_quantile"] = pairs.height - kept.height
        pairs = kept
    if options.difficulty_quantile is not None:
        pairs = add_difficulty(pairs, quantile(pairs["margin"], options.difficulty_quantile))
    gap = found.mean_length_gap_after
    if pairs.height != count:
        longer = pl.col("chosen_length").cast(pl.Int64) - pl.col("rejected_length").cast(pl.Int64)
        gap = _mean(pairs.select(longer.mean()))
    return MinedPairs(
        pairs=pairs,
        alpha=found.alpha,
        alpha_low=found.alpha_low,
        alpha_high=found.alpha_high,
        mean_length_gap_before=found.mean_length_gap_before,
        mean_length_gap_after=gap,
        reward_length_correlation_before=found.correlation_before,
        reward_length_correlation_after=found.correlation_after,
        dropped=dict(found.dropped),
        dropped_prompts=dict(found.dropped_prompts),
        dropped_pairs=dropped_pairs,
        prompts=found.prompts,
        rows=found.rows,
        curve=pl.DataFrame(
            {"alpha": found.curve_alpha, "mean_length_gap": found.curve_gap, "exact": found.curve_exact},
            schema={"alpha": pl.Float64, "mean_length_gap": pl.Float64, "exact": pl.Boolean},
        ),
    )


@contextmanager
def column_names(options: MineOptions) -> Iterator[None]:
    """Says in errors of the extension which column has which role."""
    try:
        yield
    except DataError as error:
        place = ", ".join(f"{role} column '{name}'" for role, name in options.columns.items())
        raise DataError(f"{error} ({place})") from None


def add_policies(pairs: pl.DataFrame, policies: pl.Series) -> pl.DataFrame:
    """`chosen_policy` and `rejected_policy`, of the rows that the pairs name."""
    return pairs.with_columns(policies.gather(pairs[f"{s}_row"]).alias(f"{s}_policy") for s in ("chosen", "rejected"))


def with_margin(pairs: pl.DataFrame, options: MineOptions) -> pl.DataFrame:
    """What depends on each pair's own margin: `min_margin` and `soft_label`."""
    margin = pl.col("margin").cast(pl.Float64)
    if options.min_margin is not None:
        pairs = above(pairs, options.min_margin)
    if options.soft_labels:
        label = 1.0 / (1.0 + (-margin / options.label_scale).exp())
        pairs = pairs.with_columns(label.cast(pl.Float32).alias("soft_label"))
    return pairs


def above(pairs: pl.DataFrame, least: float) -> pl.DataFrame:
    """The pairs with a margin of at least this."""
    return pairs.filter(pl.col("margin").cast(pl.Float64) >= least)


def add_difficulty(pairs: pl.DataFrame, least_easy: float) -> pl.DataFrame:
    """`difficulty`: "hard" below this margin, else "easy"."""
    hard = pl.when(pl.col("margin").cast(pl.Float64) < least_easy).then(pl.lit("hard")).otherwise(pl.lit("easy"))
    return pairs.with_columns(hard.cast(pl.Enum(["easy", "hard"])).alias("difficulty"))
