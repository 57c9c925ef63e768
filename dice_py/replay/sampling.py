"""Drawing rows without replacement, with weights and strata. The sampler itself is in the Rust crate dice-core.

The sampler is ChaCha8, seeded by a seed and a stream number, over row numbers alone, so neither the chunks of a
column nor the number of threads can change a result. A stratified draw divides its count among the strata
(replay/weights.py) and then draws from each stratum with a stream of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from dice_py._native import sample as sample_rows
from dice_py.errors import DataError, UsageError
from dice_py.replay.weights import Allocation, allocate

# Stream numbers of the generator: draws with the same seed must not share random numbers. The stratum of rank i draws
# from stream _STRATA + i.
OFFLINE, MINED, _STRATA = 0, 1, 2
_ALL = 2**64 - 1


@dataclass(frozen=True)
class Draw:
    """The rows drawn from one buffer, and the number of rows that could have been drawn."""

    rows: pl.Series
    """Row numbers, ascending (u64)."""
    candidates: int
    """Rows that could have been drawn: not excluded, and of a weight above zero."""
    strata: pl.DataFrame | None = None
    """`stratum` (its label), `candidates` (u64) and `drawn` (u64), by ascending label; None for a draw without strata.
    """


def draw(
    keys: pl.Series,
    count: int,
    seed: int,
    *,
    exclude: pl.Series | None = None,
    weights: pl.Series | None = None,
    excluded_rows: pl.Series | None = None,
    strata: pl.Series | None = None,
    allocation: Allocation = "proportional",
) -> Draw:
    """Draws `count` rows without replacement, or all candidates if there are fewer.

    Args:
        keys: the prompt of each row (integers or text, no nulls).
        count: zero or more.
        seed: 0 to 2**64 - 1.
        exclude: keys whose rows are excluded.
        weights: one finite number of zero or more per row; see `dice_py.sample_replay`.
        excluded_rows: one boolean per row; rows that are true are excluded as well.
        strata: the stratum of each row (integers, booleans or text, no nulls). The count is divided among the strata
            by `allocation` and the number of candidates in each, and each stratum is drawn from separately, by weight.

    Raises:
        UsageError: a series differs in length from `keys`, or the seed or the allocation is out of range.
        DataError: a key or stratum is null, a weight is negative or not finite, or a dtype cannot be used.
    """
    for name, series in (("excluded_rows", excluded_rows), ("strata", strata)):
        if series is not None and len(series) != len(keys):
            raise UsageError(f"there are {len(keys)} keys and {len(series)} {name}, but there must be as many")
    if excluded_rows is None and strata is None:
        return Draw(*sample(keys, count, seed, exclude, weights, OFFLINE))
    # All candidates first, so that exclusion and the checks of weights are the sampler's here as well.
    rows, _ = sample(keys, _ALL, seed, exclude, weights, OFFLINE)
    if excluded_rows is not None:
        rows = rows.filter(~excluded_rows.gather(rows))
    candidates = len(rows)

    def pick(among: pl.Series, n: int, stream: int) -> pl.Series:
        weights_among = None if weights is None else weights.gather(among)
        return among.gather(sample(among, n, seed, None, weights_among, stream)[0])

    if strata is None:
        return Draw(pick(rows, count, OFFLINE), candidates)
    labels = _labels(strata)
    groups = (
        pl.DataFrame({"row": rows, "stratum": labels.gather(rows)})
        .group_by("stratum", maintain_order=True)
        .agg("row", candidates=pl.len().cast(pl.UInt64))
        .sort("stratum")
    )
    counts = allocate(count, groups["candidates"].to_list(), allocation)
    # The stream is the rank among all labels, not among those with candidates, so that a stratum without candidates
    # does not change the random numbers of the others.
    ranks = {label: rank for rank, label in enumerate(labels.unique().sort())}
    picked = [
        pick(group, n, _STRATA + ranks[label])
        for group, n, label in zip(groups["row"], counts, groups["stratum"], strict=True)
    ]
    return Draw(
        rows=pl.concat([rows.clear(), *picked]).sort(),
        candidates=candidates,
        strata=groups.select("stratum", "candidates", drawn=pl.Series(counts, dtype=pl.UInt64)),
    )


def _labels(strata: pl.Series) -> pl.Series:
    if strata.dtype in (pl.Categorical, pl.Enum):
        # As text: the physical order of a categorical depends on what was read before.
        strata = strata.cast(pl.String)
    if not (strata.dtype.is_integer() or strata.dtype in (pl.String, pl.Boolean)):
        raise DataError(f"the strata have dtype {strata.dtype}, but must be integers, booleans or text: cast them")
    if strata.null_count():
        row = strata.is_null().arg_true()[0]
        raise DataError(f"row {row}: the stratum is null, but every pair needs one: set it, or remove the pair")
    return strata


def sample(
    keys: pl.Series,
    count: int,
    seed: int,
    exclude: pl.Series | None,
    weights: pl.Series | None,
    stream: int,
) -> tuple[pl.Series, int]:
    """Calls the Rust sampler on Polars columns.

    Args:
        keys, exclude, weights: as for `draw`.
        stream: stream number of the generator.

    Returns:
        At most `count` row numbers (u64, ascending), and the number of candidates.

    Raises:
        UsageError, DataError: as `draw`.
    """
    if not 0 <= seed < 2**64:
        raise UsageError(f"seed is {seed}, but must be an integer from 0 to 2**64 - 1")
    key_codes, exclude_codes = _codes(keys, keys.clear() if exclude is None else exclude)
    columns = [key_codes.alias("key")]
    if weights is not None:
        if len(weights) != len(keys):
            raise UsageError(f"there are {len(keys)} keys and {len(weights)} weights, but there must be as many")
        if not weights.dtype.is_numeric():
            raise DataError(f"the weights have dtype {weights.dtype}, but must be numeric: cast them to Float64")
        is_float = weights.dtype in (pl.Float32, pl.Float64)
        columns.append((weights if is_float else weights.cast(pl.Float64)).alias("weight"))
    batch, candidates = sample_rows(
        pl.DataFrame(columns).to_struct("rows"),
        exclude_codes.alias("key").to_frame().to_struct("rows"),
        count=min(count, _ALL),
        seed=seed,
        stream=stream,
    )
    return pl.DataFrame(pl.from_arrow(batch))["row"], candidates


def _codes(offline: pl.Series, exclude: pl.Series) -> tuple[pl.Series, pl.Series]:
    """Both key columns as integers that are equal where the keys are."""
    native = (pl.UInt32, pl.UInt64, pl.Int32, pl.Int64)
    if offline.dtype == exclude.dtype and offline.dtype in native:
        return offline, exclude
    text = (pl.String, pl.Categorical, pl.Enum)
    if offline.dtype in text and exclude.dtype in text:
        offline, exclude = offline.cast(pl.String), exclude.cast(pl.String)
    elif offline.dtype.is_integer() and exclude.dtype.is_integer():
        offline, exclude = offline.cast(pl.Int128), exclude.cast(pl.Int128)
    elif offline.dtype != exclude.dtype or offline.dtype.is_nested():
        raise DataError(
            f"the offline keys have dtype {offline.dtype} and the mined keys {exclude.dtype}, which cannot be "
            "compared: cast both to integers or both to text"
        )
    codes = pl.concat([offline.alias("key"), exclude.alias("key")]).rank("dense")
    return codes.head(len(offline)), codes.tail(len(exclude))
