"""Stage 3, mine: the preference pairs of a round's scored shards, or of those of several rounds in one pool.

The mining itself is `dice_py.mine_pairs`; here are the files of a run that it reads and writes. In a pool
(`mine.pool_rounds` above 1) a round's candidates are the responses of the last rounds, all scored by its own policy
and reference: the row numbers of its pairs count through the shards of all of them, the oldest round's first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from dice_py.config.mining import MineConfig
from dice_py.errors import DataError
from dice_py.mining.pairs import mine_pairs
from dice_py.storage.files import write_json
from dice_py.storage.parquet import parquet_rows, write_parquet
from dice_py.storage.schemas import MINED, MINED_LABELS


def mine(
    config: MineConfig,
    *,
    generations: list[Path],
    scores: list[Path],
    rounds: list[int],
    out: Path,
    seed: int,
    key: str,
) -> dict[str, Any]:
    """Stage 3: mines the pairs of shards into `out/mined.parquet`; row numbers count through the shards.

    Beside it, `mining.json` has the summary, and the curve of mean length gap against alpha: `alpha`,
    `mean_length_gap` and `exact` (False: of a sample of the prompts), three lists of one length.

    Args:
        generations, scores: shards, row-aligned.
        rounds: the round that sampled each shard; in a pool of rounds the greatest is the newest policy's.
        seed: of `pairing="max_random"`.

    Returns:
        What `mining.json` has, without the curve.

    Raises:
        DataError: generations and scores do not belong together, or no pair is left (saying what was dropped).
    """
    options = config.options(seed)
    wanted = [pl.col("prompt_id", options.length_column, "finish_reason")]
    if options.duplicate_column is not None:
        # As 64 bits, which is all that the miner takes of it: the ids themselves are the bulk of a shard.
        wanted.append(pl.col(options.duplicate_column).hash())
    rewards = dict.fromkeys([options.reward_column, options.second_reward_column or options.reward_column])
    responses = pl.scan_parquet(generations, glob=False).select(wanted).collect()
    scored = pl.scan_parquet(scores, glob=False).select(list(rewards)).collect()
    if responses.height != scored.height:
        raise DataError(
            f"{generations[0].parent} has {responses.height} responses, but {scores[0].parent} {scored.height} "
            "scores: they are not of one round; score these generations"
        )
    frame = responses.hstack(scored)
    if options.policy_column is not None:
        shards = zip(generations, rounds, strict=True)
        sampled_in = [pl.repeat(number, parquet_rows(file), dtype=pl.UInt32, eager=True) for file, number in shards]
        frame = frame.with_columns(pl.concat(sampled_in).alias(options.policy_column))
    mined = mine_pairs(frame, options)
    if mined.pairs.is_empty():
        pairs = f", pairs: {mined.dropped_pairs}" if any(mined.dropped_pairs.values()) else ""
        raise DataError(
            f"no pair is left of {mined.rows} responses to {mined.prompts} prompts; dropped rows: {mined.dropped}, "
            f"prompts: {mined.dropped_prompts}{pairs}. Raise generate.max_new_tokens if most were truncated, or loosen "
            "the mine.* filters"
        )
    summary = {
        "length": config.length,
        "debias": config.debias,
        "pairing": config.pairing,
        **({} if config.pool_rounds == 1 else {"pooled_rounds": sorted(set(rounds))}),
        **mined.summary(),
        "curve": mined.curve.to_dict(as_series=False),
    }
    write_json(out / "mining.json", summary)
    known = MINED | MINED_LABELS
    schema = pl.Schema({name: known[name] for name in mined.pairs.columns})
    write_parquet(out / "mined.parquet", mined.pairs, key=key, schema=schema)
    return {name: value for name, value in summary.items() if name != "curve"}
