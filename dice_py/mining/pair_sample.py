"""The pairs that people read: a sample in which every source and every kind of length gap is there.

The rule. Pairs of one source and one bucket of the length gap are a stratum. The gap is (chosen − rejected) / longer,
in tokens; its buckets are cut at `GAP_CUTS`. First the sources share the sample in proportion to their pairs, then the
buckets of a source share what it got, by largest remainders; each source and each bucket gets one pair at least, where
there is room for that. Within a stratum pairs are drawn without replacement, all with the same probability. The draw
depends on the seed, the source and the bucket alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import polars as pl

from dice_py.storage.keys import seed_for

GAP_CUTS = (-0.5, -0.1, 0.1, 0.5)
"""(chosen − rejected) / longer: from "the rejected response is more than twice as long" to the same of the chosen."""

_STRATUM = ["source", "bucket"]


def gap_bucket(chosen: str, rejected: str) -> pl.Expr:
    """The number of the bucket, 0 to 4, of two columns of lengths. Two empty responses have no gap."""
    one, other = (pl.col(name).cast(pl.Float64) for name in (chosen, rejected))
    longer = pl.max_horizontal(one, other)
    share = pl.when(longer > 0).then((one - other) / longer).otherwise(0.0)
    # A gap on a cut belongs to the bucket that is nearer to zero, on both sides.
    above = ((share > cut) if cut > 0 else (share >= cut) for cut in GAP_CUTS)
    return sum((is_above.cast(pl.UInt8) for is_above in above), pl.lit(0, dtype=pl.UInt8))


def draw_pairs(pairs: pl.DataFrame, count: int, seed: int) -> list[int]:
    """The row numbers of a stratified sample, ascending.

    Args:
        pairs: `source` (text), `chosen_tokens` and `rejected_tokens` (integers); a row for each pair.
        count: pairs to draw; with fewer rows all are taken.
    """
    if pairs.height <= count:
        return list(range(pairs.height))
    rows = pairs.select("source", bucket=gap_bucket("chosen_tokens", "rejected_tokens")).with_row_index("row")
    strata = rows.group_by(_STRATUM).agg(pl.col("row").sort()).sort(_STRATUM)
    drawn: list[int] = []
    sources = strata.partition_by("source", maintain_order=True)
    quotas = proportional([int(source["row"].list.len().sum()) for source in sources], count)
    for source, quota in zip(sources, quotas, strict=True):
        shares = proportional(source["row"].list.len().to_list(), quota)
        names = source.select(_STRATUM).iter_rows()
        for (name, bucket), members, share in zip(names, source["row"], shares, strict=True):
            at = random.Random(seed_for(seed, "pairs to read", name, bucket)).sample(range(len(members)), share)
            drawn += members.gather(at).to_list()
    return sorted(drawn)


def proportional(sizes: Sequence[int], count: int) -> list[int]:
    """`count` shared out in proportion to `sizes` by largest remainders; one at least for each size where it can be.

    Args:
        sizes: of one or more groups, each 1 or more.
        count: at most their sum.

    Returns:
        For each group, at most its size; their sum is `count`.
    """
    total = sum(sizes)
    shares = [count * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda group: (-(count * sizes[group] % total), group))
    for group in by_remainder[: count - sum(shares)]:
        shares[group] += 1
    if count >= len(sizes):
        for group, share in enumerate(shares):
            if share == 0:
                # From the group with the most: it is the least changed.
                most = max(range(len(shares)), key=lambda other: (shares[other], -other))
                shares[most] -= 1
                shares[group] = 1
    return shares
