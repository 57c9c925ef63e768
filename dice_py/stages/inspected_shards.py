"""The shards of a round that people look at: all of them, or of a very large round a sample.

Mining streams a round that does not fit into memory, and what people read of it is a sample of its pairs anyway. So of
such a round some shards are drawn, and everything about them is exact: their pairs, candidates and distributions.
"""

from __future__ import annotations

import random
from dataclasses import replace

import polars as pl

from dice_py.mining.files import ROW_BYTES
from dice_py.stages.mine import MineJob
from dice_py.storage.keys import seed_for
from dice_py.storage.parquet import parquet_rows

_SIDES = ("chosen_row", "rejected_row")


def sample_of_shards(mine: MineJob, mined: pl.DataFrame, seed: int) -> tuple[MineJob, pl.DataFrame]:
    """The job with as many of its shards as fit into its memory, and those of its pairs that are of these shards alone.

    Args:
        mine: that mined the pairs.
        mined: all of its pairs.
        seed: of the draw.

    Returns:
        Both as they are where all shards fit. Else the row numbers of the pairs count through the shards that were
        drawn, one at least.
    """
    rows = [parquet_rows(file) for file in mine.generations]
    most = int(mine.memory_gib * 2**30 / ROW_BYTES)
    if sum(rows) <= most:
        return mine, mined
    count = max(1, len(rows) * most // sum(rows))
    drawn = sorted(random.Random(seed_for(seed, "shards to read")).sample(range(len(rows)), count))
    starts = pl.Series("start", [0, *rows[:-1]], dtype=pl.UInt64).cum_sum()
    taken = pl.Series("taken", [rows[number] if number in set(drawn) else 0 for number in range(len(rows))])
    table = pl.DataFrame(
        {
            "shard": pl.Series(range(len(rows)), dtype=pl.UInt32),
            "start": starts,
            "new": taken.cast(pl.UInt64).cum_sum() - taken.cast(pl.UInt64),
            "is_drawn": taken > 0,
        }
    )
    for side in _SIDES:
        shard = (starts.search_sorted(mined[side].cast(pl.UInt64), side="right") - 1).cast(pl.UInt32)
        of = table[shard]
        mined = mined.with_columns(
            pl.when(of["is_drawn"]).then(mined[side].cast(pl.UInt64) - of["start"] + of["new"]).alias(side)
        )
    pairs = mined.drop_nulls(list(_SIDES))
    fewer = replace(
        mine,
        generations=[mine.generations[number] for number in drawn],
        scores=[mine.scores[number] for number in drawn],
        score_keys=[mine.score_keys[number] for number in drawn],
        rounds=[mine.rounds[number] for number in drawn],
    )
    return fewer, pairs
