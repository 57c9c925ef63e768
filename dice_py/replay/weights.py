"""The numbers behind a replay draw: weights, length buckets, and how a count is divided. Nothing here is random.

| what | formula | source |
| --- | --- | --- |
| weight by margin | w = max(margin, 0)^power | proportional prioritization, Schaul et al., arXiv 1511.05952, eq. 1 |
| weight by age | w = 2^(−age / half_life), age = current round − round | exponential decay, doi 10.1109/ICDE.2009.65 |
| length bucket | number of cuts below the length; cut j = length of rank ⌈j·n/B⌉ of n, j = 1 … B−1 | as in the miner |
| proportional counts | ⌊n·s_i/Σs⌋, plus one for the largest remainders | Hamilton's method |
| equal counts | n/S for each of S strata; what a stratum lacks is divided equally among the others | |

The weights of a row are multiplied. replay/sampling.py has the draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, TypeAlias

import polars as pl

from dice_py.errors import DataError, UsageError

Allocation: TypeAlias = Literal["proportional", "equal"]


def margin_weights(margins: pl.Series, power: float = 1.0) -> pl.Series:
    """max(margin, 0)^power for each row, as f64: proportional prioritization (arXiv 1511.05952, eq. 1).

    Pairs of a margin of zero or less get weight 0 and are never drawn. With `power` 0 every weight is 1.

    Raises:
        UsageError: `power` is negative or not finite.
        DataError: the column is not numeric, or a margin is null, NaN or infinite, or its power overflows; the row is
            named.
    """
    if not (math.isfinite(power) and power >= 0.0):
        raise UsageError(
            f"margin_power is {power}, but must be a finite number of zero or more (0: margins do not count)"
        )
    _numeric(margins, "margin")
    values = margins.cast(pl.Float64)
    _refuse(margins, values.is_finite(), "margin", "but must be a finite number: correct or remove the pair")
    weights = values.clip(lower_bound=0.0) ** power
    _refuse(margins, weights.is_finite(), "margin", f"which is too large for a power of {power}: lower margin_power")
    return weights.alias("weight")


def age_weights(rounds: pl.Series, *, current_round: int, half_life: float) -> pl.Series:
    """2^(−age / half_life) for each row, as f64, where age = `current_round` − round, in rounds.

    A draw depends only on the ratios of weights, so this equals forward decay (doi 10.1109/ICDE.2009.65). Beyond 1074
    half-lives a weight is 0 in f64, and its row is never drawn.

    Raises:
        UsageError: `half_life` is not above zero and finite.
        DataError: the column does not have an integer dtype, or a round is null or after `current_round`; the row is
            named.
    """
    if not (math.isfinite(half_life) and half_life > 0.0):
        raise UsageError(f"half_life is {half_life}, but must be a finite number of rounds above zero")
    if not rounds.dtype.is_integer():
        raise DataError(f"the round column has dtype {rounds.dtype}, but must hold integers: cast it to Int64")
    ages = current_round - rounds.cast(pl.Int64, strict=False)
    _refuse(
        rounds,
        ages >= 0,
        "round",
        f"but must be at most the current round ({current_round}): correct it, or remove the pair",
    )
    exponents = ages.cast(pl.Float64) / -half_life
    return exponents.to_frame("e").select(weight=pl.lit(2.0).pow(pl.col("e")))["weight"]


def replay_weights(
    pairs: pl.DataFrame,
    *,
    weight_column: str | None = None,
    margin_column: str = "margin",
    margin_power: float = 0.0,
    round_column: str = "round",
    half_life: float | None = None,
    current_round: int | None = None,
) -> pl.Series | None:
    """The product of the factors that are set, for each row; None if no factor is set (all rows weigh the same).

    A weight column alone is returned unchanged, in its dtype; every other result is f64.

    Args:
        weight_column: a factor of its own: numbers of zero or more.
        margin_power: above 0, the factor `margin_weights` of `margin_column`.
        half_life: in rounds, the factor `age_weights` of `round_column`; requires `current_round`.

    Raises:
        UsageError: `half_life` without `current_round`, or an option that a factor refuses.
        DataError: a column is missing, a weight is negative or not finite, or a value that a factor refuses.
    """
    factors = []
    if weight_column is not None:
        factors.append(_column(pairs, weight_column, "weight_column"))
    if margin_power != 0.0:
        factors.append(margin_weights(_column(pairs, margin_column, "margin_column"), margin_power))
    if half_life is not None:
        if current_round is None:
            raise UsageError("half_life is set, but the age of a pair also needs the current round: pass current_round")
        rounds = _column(pairs, round_column, "round_column")
        factors.append(age_weights(rounds, current_round=current_round, half_life=half_life))
    if len(factors) < 2:
        return factors[0] if factors else None
    if weight_column is not None:
        # The sampler checks only the product, in which a margin of zero hides an invalid weight.
        _numeric(factors[0], "weight")
        weights = factors[0].cast(pl.Float64)
        valid = weights.is_finite() & (weights >= 0.0)
        _refuse(factors[0], valid, "weight", "but must be a finite number of zero or more")
        factors[0] = weights
    product = factors[0]
    for factor in factors[1:]:
        product = product * factor
    _refuse(
        product,
        product.is_finite(),
        "product of the weights",
        "but must be finite: lower margin_power, or the values of the weight column",
    )
    return product.alias("weight")


def length_buckets(lengths: pl.Series, buckets: int) -> pl.Series:
    """The length bucket of each row, from 0, as u32: exact quantiles of `lengths`.

    Cut j (1 to buckets − 1) is the length of rank ⌈j·n/buckets⌉ among the n rows, and the bucket of a row is the
    number of cuts below its length. So buckets are closed on the right, equal lengths share a bucket, and some buckets
    may be empty.

    Raises:
        UsageError: `buckets` is below 1.
        DataError: the column does not have an integer dtype, or a length is null; the row is named.
    """
    if buckets < 1:
        raise UsageError(f"length_buckets is {buckets}, but must be 1 or more")
    if not lengths.dtype.is_integer():
        raise DataError(f"the length column has dtype {lengths.dtype}, but must hold integers: cast it to UInt32")
    _refuse(lengths, lengths.is_not_null(), "length", "but must be an integer: set it, or remove the pair")
    count = len(lengths)
    if count == 0:
        return pl.Series("bucket", [], dtype=pl.UInt32)
    ranks = [-(-j * count // buckets) for j in range(1, buckets)]
    cuts = lengths.sort().gather([rank - 1 for rank in ranks])
    return cuts.search_sorted(lengths, side="left").cast(pl.UInt32).alias("bucket")


def length_strata(lengths: pl.Series, buckets: int) -> tuple[pl.Series, dict[int, str]]:
    """`length_buckets` of each row, and the text to show for each bucket: "shortest-longest" of its rows."""
    bucket_of_row = length_buckets(lengths, buckets).alias("bucket")
    ranges = (
        pl.DataFrame([bucket_of_row, lengths.alias("length")])
        .group_by("bucket")
        .agg(low=pl.col("length").min(), high=pl.col("length").max())
    )
    return bucket_of_row, {bucket: f"{low}-{high}" for bucket, low, high in ranges.iter_rows()}


def proportional_counts(total: int, shares: Sequence[float]) -> list[int]:
    """`total` divided in proportion to `shares` (zero or more), by largest remainder; the counts sum to `total`.

    The quotas are exact fractions, and the earlier share wins ties of remainders. With integer shares that sum to
    `total` or more, no count is above its share.

    Raises:
        UsageError: `total` is negative, a share is negative or not finite, or all are zero and `total` is not.
    """
    if total < 0:
        raise UsageError(f"the total is {total}, but must be zero or more")
    if not all(math.isfinite(share) and share >= 0 for share in shares):
        raise UsageError(f"the shares are {', '.join(map(str, shares))}, but must be finite numbers of zero or more")
    parts = [Fraction(share) for share in shares]
    sum_of_parts = sum(parts)
    if sum_of_parts == 0:
        if total:
            raise UsageError(f"{total} rows cannot be divided: no share is above zero")
        return [0] * len(parts)
    quotas = [total * part / sum_of_parts for part in parts]
    counts = [math.floor(quota) for quota in quotas]
    # Sorting is stable, so the earlier share wins ties.
    order = sorted(range(len(parts)), key=lambda i: counts[i] - quotas[i])
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


def equal_counts(total: int, available: Sequence[int]) -> list[int]:
    """`total` divided equally among strata of `available` rows; what a stratum lacks is divided among the others.

    The remainder of the division goes to the earlier strata, one row each. The counts sum to
    min(total, Σ available).
    """
    counts = [0] * len(available)
    unfilled = list(range(len(available)))
    remaining = min(total, sum(available))
    while unfilled:
        each, remainder = divmod(remaining, len(unfilled))
        exhausted = [i for i in unfilled if available[i] <= each]
        if not exhausted:
            for position, i in enumerate(unfilled):
                counts[i] = each + (1 if position < remainder else 0)
            break
        # Strata that have too few rows are used up before the rest is divided again.
        for i in exhausted:
            counts[i] = available[i]
            remaining -= available[i]
        unfilled = [i for i in unfilled if available[i] > each]
    return counts


def allocate(total: int, available: Sequence[int], allocation: Allocation) -> list[int]:
    """Rows to draw from each stratum of `available` rows: `proportional_counts` or `equal_counts`.

    The counts sum to min(total, Σ available), and none is above the rows of its stratum.

    Raises:
        UsageError: `allocation` is unknown.
    """
    if allocation not in ("proportional", "equal"):
        raise UsageError(f"allocation is {allocation!r}, but must be one of proportional, equal")
    if allocation == "equal":
        return equal_counts(total, available)
    return proportional_counts(min(total, sum(available)), available)


def _column(pairs: pl.DataFrame, name: str, option: str) -> pl.Series:
    if name not in pairs.columns:
        raise DataError(
            f"column '{name}' not found in the offline pairs; columns are {', '.join(pairs.columns)}; name it with "
            f"{option}="
        )
    return pairs[name]


def _numeric(values: pl.Series, what: str) -> None:
    if not values.dtype.is_numeric():
        raise DataError(f"the {what}s have dtype {values.dtype}, but must be numeric: cast them to Float64")


def _refuse(values: pl.Series, valid: pl.Series, what: str, problem: str) -> None:
    """Raises a DataError that names the first row that is not `valid` (null is not)."""
    invalid = (~valid.fill_null(False)).arg_true()
    if len(invalid):
        row = int(invalid[0])
        value = values[row]
        raise DataError(f"row {row}: the {what} is {'null' if value is None else value}, {problem}")
