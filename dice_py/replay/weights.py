"""Numbers that steer the replay draw: weights, length buckets, and how a count is shared out. No randomness here.

| what | formula | source |
| --- | --- | --- |
| weight by margin | w = max(margin, 0)^power | proportional prioritisation, Schaul et al., arXiv 1511.05952, eq. 1 |
| weight by age | w = 2^(−age / half_life), age = current round − round | exponential decay, doi 10.1109/ICDE.2009.65 |
| length bucket | cuts below the length; cut j = length of rank ⌈j·n/B⌉ among n, j = 1 … B−1 | as in the miner |
| proportional counts | ⌊n·s_i/Σs⌋, and one more for the largest remainders | Hamilton's method |
| equal counts | n/S for each of S strata; what a stratum lacks is shared equally by the others | |

Weights of one row multiply. The draw itself is Rust's (rust/dice-core/src/replay.rs).
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
    """max(margin, 0)^power for each row, as f64: proportional prioritisation (arXiv 1511.05952, eq. 1).

    Pairs of a margin of zero or less are never drawn, unless `power` is 0, which makes every weight 1.

    Raises:
        UsageError: `power` is negative or not finite.
        DataError: the column is not numeric, or a margin is null, NaN or infinite, or its power infinite, naming
            the row.
    """
    if not (math.isfinite(power) and power >= 0.0):
        raise UsageError(f"margin_power is {power}: give a finite number of zero or more (0: margins do not count)")
    _numeric(margins, "margin")
    values = margins.cast(pl.Float64)
    _refuse(margins, values.is_finite(), "margin", "fix or remove the pair")
    weights = values.clip(lower_bound=0.0) ** power
    _refuse(margins, weights.is_finite(), "margin", f"too large for a power of {power}: lower margin_power")
    return weights.alias("weight")


def age_weights(rounds: pl.Series, *, current_round: int, half_life: float) -> pl.Series:
    """2^(−age / half_life) for each row, as f64, where age = `current_round` − round, in rounds.

    Only ratios of weights matter to a draw, so this is forward decay as well (doi 10.1109/ICDE.2009.65). Beyond
    1074 half-lives a weight is 0 in f64, and its row is never drawn.

    Raises:
        UsageError: `half_life` is not above zero and finite.
        DataError: the column is not of whole numbers, or a round is null or after `current_round`, naming the row.
    """
    if not (math.isfinite(half_life) and half_life > 0.0):
        raise UsageError(f"half_life is {half_life}: give a finite number of rounds above zero")
    if not rounds.dtype.is_integer():
        raise DataError(f"the round column has dtype {rounds.dtype}, but must hold whole numbers: cast it to Int64")
    ages = current_round - rounds.cast(pl.Int64, strict=False)
    _refuse(rounds, ages >= 0, "round", f"give a round up to the current one ({current_round}), or remove the pair")
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
    """The product of the chosen factors for each row; None where none is chosen (all rows weigh the same).

    `weight_column`: numbers of zero or more. `margin_power` above 0: `margin_weights` of `margin_column`.
    `half_life`: `age_weights` of `round_column`, which also needs `current_round`. A weight column alone is given
    back as it is.

    Raises:
        UsageError: `half_life` without `current_round`, or what the factors raise.
        DataError: a column is not there, a weight is negative or not finite, or what the factors raise.
    """
    factors = []
    if weight_column is not None:
        factors.append(_column(pairs, weight_column, "weight_column"))
    if margin_power != 0.0:
        factors.append(margin_weights(_column(pairs, margin_column, "margin_column"), margin_power))
    if half_life is not None:
        if current_round is None:
            raise UsageError("half_life is given, but no current_round from which the age of a pair is counted")
        rounds = _column(pairs, round_column, "round_column")
        factors.append(age_weights(rounds, current_round=current_round, half_life=half_life))
    if len(factors) < 2:
        return factors[0] if factors else None
    if weight_column is not None:
        # Rust would see the product alone, in which a zero margin hides a weight that is wrong.
        _numeric(factors[0], "weight")
        weights = factors[0].cast(pl.Float64)
        fine = weights.is_finite() & (weights >= 0.0)
        _refuse(factors[0], fine, "weight", "but must be a finite number of zero or more")
        factors[0] = weights
    product = factors[0]
    for factor in factors[1:]:
        product = product * factor
    _refuse(product, product.is_finite(), "product of the weights", "lower margin_power or the weight column's values")
    return product.alias("weight")


def length_buckets(lengths: pl.Series, buckets: int) -> pl.Series:
    """The length bucket of each row, from 0, as u32: exact quantiles over all rows given.

    Cut j (1 to buckets − 1) is the length of rank ⌈j·n/buckets⌉ among the n rows, and a row's bucket is the number
    of cuts below its length. So buckets are closed on the right, equal lengths share one, and some may be empty.

    Raises:
        UsageError: `buckets` below 1.
        DataError: the column is not of whole numbers, or a length is null, naming the row.
    """
    if buckets < 1:
        raise UsageError(f"length_buckets is {buckets}: give 1 or more")
    if not lengths.dtype.is_integer():
        raise DataError(f"the length column has dtype {lengths.dtype}, but must hold whole numbers: cast it to UInt32")
    _refuse(lengths, lengths.is_not_null(), "length", "fix or remove the pair")
    count = len(lengths)
    if count == 0:
        return pl.Series("bucket", [], dtype=pl.UInt32)
    ranks = [-(-j * count // buckets) for j in range(1, buckets)]
    cuts = lengths.sort().gather([rank - 1 for rank in ranks])
    return cuts.search_sorted(lengths, side="left").cast(pl.UInt32).alias("bucket")


def proportional_counts(total: int, shares: Sequence[float]) -> list[int]:
    """`total` split in proportion to `shares` (zero or more), by largest remainder: whole numbers that sum to `total`.

    Computed in fractions, so exactly; equal remainders go to the earlier share. With whole-number shares that sum
    to `total` or more, no count is above its share.

    Raises:
        UsageError: `total` is negative, a share is negative or not finite, or all are zero and `total` is not.
    """
    if total < 0:
        raise UsageError(f"the total is {total}: give zero or more")
    if not all(math.isfinite(share) and share >= 0 for share in shares):
        raise UsageError(f"the shares are {', '.join(map(str, shares))}: give finite numbers of zero or more")
    parts = [Fraction(share) for share in shares]
    whole = sum(parts)
    if whole == 0:
        if total:
            raise UsageError(f"{total} rows cannot be shared out: no share is above zero")
        return [0] * len(parts)
    quotas = [total * part / whole for part in parts]
    counts = [math.floor(quota) for quota in quotas]
    # Sorting is stable: of equal remainders the earlier comes first.
    order = sorted(range(len(parts)), key=lambda i: counts[i] - quotas[i])
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


def equal_counts(total: int, available: Sequence[int]) -> list[int]:
    """`total` split equally over strata that have `available` rows; what one lacks is shared by the others.

    What does not divide goes, one each, to the earlier strata. The counts sum to min(total, Σ available).
    """
    counts = [0] * len(available)
    open_ = list(range(len(available)))
    left = min(total, sum(available))
    while open_:
        each, over = divmod(left, len(open_))
        short = [i for i in open_ if available[i] <= each]
        if not short:
            for at, i in enumerate(open_):
                counts[i] = each + (1 if at < over else 0)
            break
        # All of what is short is taken, before the rest is shared out anew.
        for i in short:
            counts[i] = available[i]
            left -= available[i]
        open_ = [i for i in open_ if available[i] > each]
    return counts


def allocate(total: int, available: Sequence[int], allocation: Allocation) -> list[int]:
    """How many rows to draw of each stratum, out of `available`: `proportional_counts` or `equal_counts`.

    The counts sum to min(total, Σ available), and none is above what its stratum has.

    Raises:
        UsageError: an unknown `allocation`.
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


def _refuse(values: pl.Series, fine: pl.Series, what: str, then: str) -> None:
    """Names the first row that is not fine; null is never fine."""
    bad = (~fine.fill_null(False)).arg_true()
    if len(bad):
        row = int(bad[0])
        value = values[row]
        raise DataError(f"row {row}: the {what} is {'null' if value is None else value}; {then}")
