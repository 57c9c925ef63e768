"""What a mining did to lengths and margins, in bounded size: histograms for the report, and counterfactual minings.

All bins are counted exactly, and what lies beyond the outermost edges is counted as `outside`: 0.5 % on each side at
most, so that one long answer does not flatten the picture. Bins of lengths have whole widths, since a width of 1.7
would count one and two lengths in turn.
"""

from __future__ import annotations

import itertools
from typing import Any

import polars as pl

from dice_py.config.mining import MiningOptions
from dice_py.mining.comparison import compare_mining
from dice_py.mining.labels import finite
from dice_py.mining.ranking import usable_responses

LENGTH_BINS = 40
REWARD_BINS = 30
_MOST_STEPS = 50
"""Buckets whose means are listed; of more, some are left out evenly."""
_TAIL = 0.005
_MATCHED_RATIO = 0.1
"""`length_ratio` of the counterfactual `debias=matched`, where the options name no tolerance of their own."""


def mining_distributions(
    scored: pl.DataFrame, mined: pl.DataFrame, options: MiningOptions, alpha: float | None
) -> dict[str, Any]:
    """Histograms of a mining, and what other settings of `debias` would have mined; ready for JSON, under 100 kB.

    A histogram has `edges` (n + 1 ascending numbers; [] without values), counts of n bins, and `outside`, the values
    beyond the edges. Bins are closed on the left; the last one of rewards and of margins is closed on both sides.

    Args:
        scored: one row per response, with the columns that `options` names, as `mine_pairs` takes it.
        mined: the pairs of that mining, of schema `MINED`.
        options: of that mining.
        alpha: its penalty, in reward per unit of length; None: `debias` has none.

    Returns:
        - `rows`, `usable`: responses in all, and those that mining may use.
        - `reward_length`: `length_edges`, `reward_edges`, and `counts`, a list of [length bin, reward bin, count]
          without zeros, over the usable responses; `outside`.
        - `lines`: what the rewards are compared with, as functions of length: `name` ("penalty": the line, or steps,
          of equal score through the mean; "regression": least squares) and `points`, a list of [length, reward].
        - `slope`: of the regression, in reward per unit of length; None where lengths do not differ.
        - `lengths`: `edges`, and `chosen_before`, `rejected_before` (pairs of `debias="none"`), `chosen_after`,
          `rejected_after` (pairs of this mining): each with `counts`, `mean`, `outside`.
        - `margins`: `edges`, `counts`, `outside`, of this mining's pairs.
        - `variants`: this mining first, then others: `variant`, `error`, and, if it was mined, `pairs`,
          `prompts_with_pair`, `alpha`, `mean_length_gap`, `chosen_longer_share`, `reward_length_correlation`,
          `overlap` (Jaccard index of its pairs and this mining's).
    """
    compared = compare_mining(scored, options, _variants(options))
    undebiased = next(
        each.pairs
        for variant, each in zip(compared.variants, compared.mined, strict=True)
        if each is not None and variant.options is not None and variant.options.debias == "none"
    )
    usable = usable_responses(scored, options).filter("usable")
    return {
        "rows": scored.height,
        "usable": usable.height,
        "reward_length": _reward_length(usable),
        "slope": _slope(usable),
        "lines": _lines(usable, options, alpha),
        "lengths": _lengths(undebiased, mined),
        "margins": _margins(mined["margin"]),
        "variants": [
            _variant_entry(entry, overlap)
            for entry, overlap in zip(compared.summary()["variants"], compared.overlap[0], strict=True)
        ],
    }


def _variants(options: MiningOptions) -> list[dict[str, Any]]:
    """This mining's own settings of length first, then others; those that are equal are mined once."""
    own: dict[str, Any] = {"debias": options.debias}
    if options.debias == "linear":
        own["alpha"] = options.alpha
    tolerances = {name: getattr(options, name) for name in ("length_tolerance", "length_ratio")}
    tolerance = {name: value for name, value in tolerances.items() if value is not None}
    if options.debias == "matched":
        own |= tolerance
    return [
        own,
        {"debias": "none"},
        {"debias": "linear", "alpha": "auto"},
        {"debias": "per_token"},
        {"debias": "bucket"},
        {"debias": "matched", **(tolerance or {"length_ratio": _MATCHED_RATIO})},
    ]


def _variant_entry(entry: dict[str, Any], overlap: float | None) -> dict[str, Any]:
    shown: dict[str, Any] = {"variant": entry["variant"], "error": entry["error"]}
    if entry["error"] is not None:
        return shown
    same = ("pairs", "prompts_with_pair", "alpha", "chosen_longer_share")
    after = ("mean_length_gap", "reward_length_correlation")
    shown |= {name: entry[name] for name in same}
    shown |= {name: entry[f"{name}_after"] for name in after}
    return shown | {"overlap": overlap}


def _reward_length(usable: pl.DataFrame) -> dict[str, Any]:
    length_edges = _whole_edges(usable["length"], LENGTH_BINS)
    reward_edges = _edges(usable["reward"], REWARD_BINS)
    bins = pl.DataFrame({"x": _bins(usable["length"], length_edges), "y": _bins(usable["reward"], reward_edges)})
    inside = bins.drop_nulls()
    counts = inside.group_by("x", "y").len().sort("x", "y")
    return {
        "length_edges": length_edges,
        "reward_edges": reward_edges,
        "counts": [list(row) for row in counts.iter_rows()],
        "outside": bins.height - inside.height,
    }


def _slope(usable: pl.DataFrame) -> float | None:
    """Least squares of reward on length: cov(r, l) / var(l)."""
    reward, length = pl.col("reward"), pl.col("length").cast(pl.Float64)
    # About the means, so that long lengths with a small spread lose no digits.
    centred = usable.select(r=reward - reward.mean(), l=length - length.mean())
    products, squares = centred.select((pl.col("r") * pl.col("l")).sum(), (pl.col("l") ** 2).sum()).row(0)
    return finite(products / squares) if squares else None


def _lines(usable: pl.DataFrame, options: MiningOptions, alpha: float | None) -> list[dict[str, Any]]:
    if usable.is_empty():
        return []
    lengths, rewards = usable["length"], usable["reward"]
    ends = [float(_number(lengths.min())), float(_number(lengths.max()))]
    middle, mean = _number(lengths.mean()), _number(rewards.mean())

    def straight(name: str, slope: float) -> dict[str, Any]:
        return {"name": name, "points": [[end, mean + slope * (end - middle)] for end in ends]}

    lines = []
    if alpha is not None:
        lines.append(straight("penalty", alpha))
    elif options.debias == "per_token" and middle:
        lines.append({"name": "penalty", "points": [[end, mean / middle * end] for end in ends]})
    elif options.debias == "bucket":
        lines.append({"name": "penalty", "points": _bucket_means(usable, options.buckets)})
    slope = _slope(usable)
    return lines if slope is None else [*lines, straight("regression", slope)]


def _bucket_means(usable: pl.DataFrame, buckets: int) -> list[list[float]]:
    """The mean reward of each length quantile, at its least and its greatest length (`mine_pairs` has the cuts)."""
    lengths = usable["length"].sort()
    ranks = {-(-j * lengths.len() // buckets) for j in range(1, min(buckets, lengths.len()) + 1)}
    cuts = lengths.gather(sorted(rank - 1 for rank in ranks)).unique().sort()
    means = (
        usable.with_columns(bucket=cuts.search_sorted(usable["length"], side="left"))
        .group_by("bucket")
        .agg(pl.col("length").min().alias("low"), pl.col("length").max().alias("high"), pl.col("reward").mean())
        .sort("low")
    )
    shown = means.gather_every(-(-means.height // _MOST_STEPS))
    return [[float(x), y] for low, high, y in shown.select("low", "high", "reward").iter_rows() for x in (low, high)]


def _lengths(before: pl.DataFrame, after: pl.DataFrame) -> dict[str, Any]:
    """Lengths of chosen and rejected on common bins."""
    sides = {
        f"{side}_{when}": pairs[f"{side}_length"].cast(pl.Int64)
        for when, pairs in (("before", before), ("after", after))
        for side in ("chosen", "rejected")
    }
    edges = _whole_edges(pl.concat(sides.values()), LENGTH_BINS)
    return {"edges": edges, **{name: _histogram(values, edges) for name, values in sides.items()}}


def _margins(margins: pl.Series) -> dict[str, Any]:
    values = margins.cast(pl.Float64)
    edges = _edges(values, LENGTH_BINS)
    return {"edges": edges, **_histogram(values, edges)}


def _histogram(values: pl.Series, edges: list[Any]) -> dict[str, Any]:
    """`counts` by bin, `mean` of all values, and `outside`."""
    counts = [0] * max(len(edges) - 1, 0)
    inside = _bins(values, edges).drop_nulls()
    for index, count in inside.value_counts().iter_rows():
        counts[index] = count
    mean = values.mean()
    return {"counts": counts, "mean": None if mean is None else _number(mean), "outside": values.len() - inside.len()}


def _bins(values: pl.Series, edges: list[Any]) -> pl.Series:
    """The number of each value's bin (u32); null beyond the edges."""
    if len(edges) < 2:
        return pl.repeat(None, values.len(), dtype=pl.UInt32, eager=True)
    borders = pl.Series(edges, dtype=values.dtype)
    bins = len(edges) - 1
    found = borders.search_sorted(values, side="right").cast(pl.Int64) - 1
    if values.dtype.is_float():  # the greatest value is the last edge
        found = found.set(values == edges[-1], bins - 1)
    return found.set((found < 0) | (found >= bins), None).cast(pl.UInt32)


def _whole_edges(values: pl.Series, bins: int) -> list[int]:
    """At most `bins` bins of whole width, without the tails; the last edge is beyond the greatest length."""
    if values.is_empty():
        return []
    low, high = (int(_number(value)) for value in _bulk(values))
    width = (high - low) // bins + 1
    count = (high - low) // width + 1
    return [low + width * i for i in range(count + 1)]


def _edges(values: pl.Series, bins: int) -> list[float]:
    """`bins` bins of one width, without the tails; one bin about the value where all are equal."""
    if values.is_empty():
        return []
    low, high = (_number(value) for value in _bulk(values))
    step = (high - low) / bins
    edges = [*(low + step * i for i in range(bins)), high]
    # Of neighboring floats there are no 30 numbers between.
    if any(after <= before for before, after in itertools.pairwise(edges)):
        margin = max(0.5, abs(low) * 1e-6)
        return [low - margin, high + margin]
    return edges


def _bulk(values: pl.Series) -> tuple[Any, Any]:
    """The least and the greatest value, without 0.5 % on each side; of up to 200 values nothing is left out."""
    ascending = values.sort()
    tail = int(_TAIL * (ascending.len() - 1))
    return ascending[tail], ascending[ascending.len() - 1 - tail]


def _number(value: Any) -> float:
    return float(value)
