"""Accuracy of a reward on slices of preference pairs: by the sign of the length gap, by length, and by source.

One number hides where a reward fails. A reward that likes length has a good accuracy where the chosen response is the
longer one, and a bad one where it is the shorter.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import polars as pl

from dice_py.evaluation.metrics import RESAMPLES
from dice_py.storage.keys import seed_for

MINIMUM_PAIRS = 20
"""Pairs that a slice needs for an interval, and to count as the worst one."""
LENGTH_BUCKETS = 4
CHOSEN_LONGER, CHOSEN_SHORTER, EQUAL_LENGTH = "chosen longer", "chosen shorter", "equal length"
OTHER_SOURCES = "other sources"
"""The sources that have fewer than the minimum of pairs, together."""
SLICES = pl.Schema(
    {"slice": pl.String, "pairs": pl.Int64, "accuracy": pl.Float64, "low": pl.Float64, "high": pl.Float64}
)


class Slice(NamedTuple):
    """One slice of `slice_accuracies`."""

    name: str
    pairs: int
    accuracy: float
    ci95: list[float]
    """95 % confidence interval [low, high] of the accuracy."""


def accuracy_interval(outcomes: pl.Series, seed: int) -> list[float]:
    """95 % confidence interval [low, high] of the mean of outcomes in [0, 1], by a bootstrap of 2000 resamples.

    Where all outcomes are equal, every resample is too, and a bootstrap would claim certainty. The interval is Wilson's
    then (J. Am. Stat. Assoc. 22, 1927): of 20 pairs that are all right, [0.84, 1].

    Args:
        outcomes: 1.0 for a pair that is ranked right, 0.5 for a tie, else 0.0; one or more, no nulls.
        seed: 0 or more; the same seed gives the same interval.
    """
    import numpy as np

    values, counts = np.unique(outcomes.to_numpy(), return_counts=True)
    total = int(counts.sum())
    if len(values) == 1:
        return _wilson(float(values[0]), total)
    # A resample of pairs is a draw of how often each of the few values comes: the same distribution, whatever the size.
    drawn = np.random.default_rng(seed % 2**63).multinomial(total, counts / total, size=RESAMPLES)
    low, high = np.percentile(drawn @ values / total, [2.5, 97.5])
    return [float(low), float(high)]


def _wilson(mean: float, total: int) -> list[float]:
    from scipy.stats import norm

    z = float(norm.ppf(0.975))
    middle = (mean + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * (mean * (1 - mean) / total + z * z / (4 * total * total)) ** 0.5
    return [max(0.0, middle - half), min(1.0, middle + half)]


def length_buckets(lengths: pl.Series, buckets: int = LENGTH_BUCKETS) -> pl.Series:
    """The quantile bucket of each length, as text that names its range ("length 12 to 40").

    Equal lengths are in one bucket, so there may be fewer buckets than asked for.

    Args:
        lengths: numbers, in tokens; no nulls.
    """
    import numpy as np

    values = lengths.cast(pl.Float64).to_numpy()
    if not len(values):
        return pl.Series(lengths.name, [], dtype=pl.String)
    # "lower": edges are lengths that occur, so that no bucket between two of them is empty.
    edges = np.unique(np.quantile(values, [place / buckets for place in range(1, buckets)], method="lower"))
    places = np.searchsorted(edges, values, side="left")
    names = {}
    for place in np.unique(places):
        inside = values[places == place]
        names[int(place)] = f"length {inside.min():.4g} to {inside.max():.4g}"
    return pl.Series(lengths.name, [names[int(place)] for place in places], dtype=pl.String)


def pair_slices(
    chosen_tokens: pl.Series, rejected_tokens: pl.Series, source: pl.Series | None, minimum: int = MINIMUM_PAIRS
) -> dict[str, pl.Series]:
    """Which pairs are in each slice, by the slice's name; slices without a pair are absent.

    Args:
        chosen_tokens, rejected_tokens: lengths of the responses, in tokens.
        source: where each pair is from; None, or null for a pair: it is in no slice of a source.
        minimum: sources with fewer pairs are one slice, `OTHER_SOURCES`.

    Returns:
        A Boolean series for each slice, one entry per pair: first those of the length gap, then those of the mean
        length of the two responses, then those of the sources, largest first.
    """
    gap = chosen_tokens.cast(pl.Int64) - rejected_tokens.cast(pl.Int64)
    members = {CHOSEN_LONGER: gap > 0, CHOSEN_SHORTER: gap < 0, EQUAL_LENGTH: gap == 0}
    means = (chosen_tokens.cast(pl.Float64) + rejected_tokens.cast(pl.Float64)) / 2
    names = length_buckets(means)
    by_length = pl.DataFrame({"name": names, "mean": means}).group_by("name").agg(pl.col("mean").min()).sort("mean")
    members |= {name: names == name for name in by_length["name"]}
    if source is not None:
        members |= _of_sources(source, minimum)
    return {name: inside for name, inside in members.items() if inside.any()}


def _of_sources(source: pl.Series, minimum: int) -> dict[str, pl.Series]:
    counts = source.alias("source").drop_nulls().value_counts().sort("count", "source", descending=[True, False])
    large = counts.filter(pl.col("count") >= minimum)["source"]
    members = {f"source {name}": (source == name).fill_null(False) for name in large}
    return members | {OTHER_SOURCES: source.is_not_null() & ~source.is_in(large.implode())}


def slice_accuracies(
    outcomes: pl.Series,
    chosen_tokens: pl.Series,
    rejected_tokens: pl.Series,
    source: pl.Series | None,
    seed: int,
    minimum: int = MINIMUM_PAIRS,
) -> pl.DataFrame:
    """The accuracy on each slice of `pair_slices`.

    Args:
        outcomes: `reward_outcomes` of each pair.
        chosen_tokens, rejected_tokens, source: as of `pair_slices`.
        seed: of the bootstrap; 0 or more.
        minimum: a slice of fewer pairs has no interval.

    Returns:
        `SLICES`: `slice`, `pairs`, `accuracy` in [0, 1], and its 95 % interval `low` and `high`, null where the slice
        has fewer than `minimum` pairs.
    """
    rows: list[dict[str, Any]] = []
    for name, inside in pair_slices(chosen_tokens, rejected_tokens, source, minimum).items():
        values = outcomes.filter(inside)
        low, high = accuracy_interval(values, seed_for(seed, name)) if len(values) >= minimum else (None, None)
        rows.append({"slice": name, "pairs": len(values), "accuracy": values.mean(), "low": low, "high": high})
    return pl.DataFrame(rows, schema=SLICES)


def worst_slice(slices: pl.DataFrame) -> Slice | None:
    """The slice of lowest accuracy among those that have an interval, the first of equal ones; None: there is none.

    Args:
        slices: as of `slice_accuracies`.
    """
    known = slices.drop_nulls("low")
    if known.is_empty():
        return None
    row = known.row(int(known["accuracy"].arg_min() or 0), named=True)
    return Slice(row["slice"], row["pairs"], row["accuracy"], [row["low"], row["high"]])
