"""Drawing rows without replacement: Rust's sampler (`_native.sample`), and strata on top of it.

The sampler is ChaCha8, seeded by a seed and a stream number, over row numbers alone (rust/dice-core/src/replay.rs):
neither chunks nor threads can change a result. A stratified draw is one draw for each stratum, each from a stream
of its own, after the count was shared out (replay/weights.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from dice_py import _native
from dice_py.errors import DataError, UsageError
from dice_py.replay.weights import Allocation, allocate, length_buckets

# Numbers of the generator's streams: draws that share a seed must not share random numbers. Stratum i draws from
# stream _STRATA + i.
OFFLINE, MINED, _STRATA = 0, 1, 2
_ALL = 2**64 - 1


@dataclass(frozen=True)
class Draw:
    """Rows that were drawn of one buffer, and what there was to draw from."""

    rows: pl.Series
    """Row numbers, ascending (u64)."""
    candidates: int
    """Rows that could have been drawn: not left out, and of a weight above zero."""
    strata: pl.DataFrame | None = None
    """`stratum` (its label), `candidates u64`, `drawn u64`, by ascending stratum; None for a draw without strata."""


def draw(
    keys: pl.Series,
    count: int,
    seed: int,
    *,
    exclude: pl.Series | None = None,
    weights: pl.Series | None = None,
    left_out: pl.Series | None = None,
    strata: pl.Series | None = None,
    allocation: Allocation = "proportional",
) -> Draw:
    """`count` rows without replacement, or all that there are if they are fewer.

    Args:
        keys: the prompt of each row (integers or text, no nulls).
        exclude: rows of these keys are left out.
        weights: numbers of zero or more; see `dice_py.sample_replay`.
        left_out: booleans; rows that are true are left out as well.
        strata: a label for each row (integers, booleans or text, no nulls). The count is shared out over the
            strata by `allocation` and the number of their candidates, and each is drawn from apart, by weight.

    Raises:
        UsageError: series of other lengths than `keys`, a seed or an allocation that is none.
        DataError: a null key or stratum, a wrong weight, or columns of types that cannot serve.
    """
    for name, series in (("left_out", left_out), ("strata", strata)):
        if series is not None and len(series) != len(keys):
            raise UsageError(f"there are {len(keys)} keys and {len(series)} {name}: give as many")
    if left_out is None and strata is None:
        return Draw(*sample(keys, count, seed, exclude, weights, OFFLINE))
    # All candidates first: what leaves a row out, and which weights are refused, is decided in one place.
    rows, _ = sample(keys, _ALL, seed, exclude, weights, OFFLINE)
    if left_out is not None:
        rows = rows.filter(~left_out.gather(rows))
    candidates = len(rows)

    def pick(among: pl.Series, n: int, stream: int) -> pl.Series:
        of = None if weights is None else weights.gather(among)
        return among.gather(sample(among, n, seed, None, of, stream)[0])

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
    # Streams by the rank of a label among all that there are, so that a stratum which is left out altogether
    # changes no other's random numbers.
    ranks = {label: at for at, label in enumerate(labels.unique().sort())}
    drawn = [
        pick(group, n, _STRATA + ranks[label])
        for group, n, label in zip(groups["row"], counts, groups["stratum"], strict=True)
    ]
    return Draw(
        rows=pl.concat([rows.clear(), *drawn]).sort(),
        candidates=candidates,
        strata=groups.select("stratum", "candidates", drawn=pl.Series(counts, dtype=pl.UInt64)),
    )


def length_strata(lengths: pl.Series, buckets: int) -> tuple[pl.Series, dict[int, str]]:
    """`length_buckets` of every row, and what to call them: "shortest-longest" of the rows in each."""
    found = length_buckets(lengths, buckets).alias("bucket")
    spans = (
        pl.DataFrame([found, lengths.alias("length")])
        .group_by("bucket")
        .agg(low=pl.col("length").min(), high=pl.col("length").max())
    )
    return found, {bucket: f"{low}-{high}" for bucket, low, high in spans.iter_rows()}


def _labels(strata: pl.Series) -> pl.Series:
    if strata.dtype in (pl.Categorical, pl.Enum):
        # By text: the physical order of a categorical depends on what was read before.
        strata = strata.cast(pl.String)
    if not (strata.dtype.is_integer() or strata.dtype in (pl.String, pl.Boolean)):
        raise DataError(f"the strata have dtype {strata.dtype}, but must be integers, booleans or text: cast them")
    if strata.null_count():
        raise DataError(f"row {strata.is_null().arg_true()[0]}: the stratum is null; name one, or remove the pair")
    return strata


def sample(
    keys: pl.Series,
    count: int,
    seed: int,
    exclude: pl.Series | None,
    weights: pl.Series | None,
    stream: int,
) -> tuple[pl.Series, int]:
    """Row numbers (u64, ascending), and how many rows there were to choose from. Rust's draw on Polars columns."""
    if not 0 <= seed < 2**64:
        raise UsageError(f"seed is {seed}: give a whole number from 0 to 2**64 - 1")
    offline_codes, exclude_codes = _codes(keys, keys.clear() if exclude is None else exclude)
    columns = [offline_codes.alias("key")]
    if weights is not None:
        if len(weights) != len(keys):
            raise UsageError(f"there are {len(keys)} keys and {len(weights)} weights: give as many")
        if not weights.dtype.is_numeric():
            raise DataError(f"the weights have dtype {weights.dtype}, but must be numeric: cast them to Float64")
        exact = weights.dtype in (pl.Float32, pl.Float64)
        columns.append((weights if exact else weights.cast(pl.Float64)).alias("weight"))
    batch, candidates = _native.sample(
        pl.DataFrame(columns).to_struct("rows"),
        exclude_codes.alias("key").to_frame().to_struct("rows"),
        count=min(count, _ALL),
        seed=seed,
        stream=stream,
    )
    return pl.DataFrame(pl.from_arrow(batch))["row"], candidates


def _codes(offline: pl.Series, exclude: pl.Series) -> tuple[pl.Series, pl.Series]:
    """Both key columns as integers that agree where the keys do."""
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
            f"the offline keys have dtype {offline.dtype} and the mined ones {exclude.dtype}, which cannot "
            "be compared: cast one to the other's, integers or text"
        )
    codes = pl.concat([offline.alias("key"), exclude.alias("key")]).rank("dense")
    return codes.head(len(offline)), codes.tail(len(exclude))
