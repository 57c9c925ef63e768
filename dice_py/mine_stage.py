"""Stage 3, mine: the preference pairs of a round's scored shards, or of those of several rounds in one pool.

The mining itself is `dice_py.mine_pairs`; here are the files of a run that it reads and writes. In a pool
(`mine.pool_rounds` above 1) a round's candidates are the responses of the last rounds, all scored by its own policy
and reference: the row numbers of its pairs count through the shards of all of them, the oldest round's first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.artefacts import (
    MINED,
    MINED_LABELS,
    PROMPTS,
    Manifest,
    digest,
    parquet_key,
    parquet_rows,
    read_parquet,
    write_json,
    write_parquet,
)
from dice_py.config import MineConfig
from dice_py.errors import DataError
from dice_py.mine import mine_pairs


@dataclass(frozen=True)
class Candidates:
    """What a round scores and mines: shards, the oldest round's first."""

    generations: list[Path]
    keys: list[str]
    """The key of each shard."""
    rounds: list[int]
    """The round that sampled each shard."""
    prompts: Path
    """The prompts of all of them, each once."""


def candidates(folder: Path, manifest: Manifest, number: int, pool_rounds: int) -> Candidates:
    """The shards of the last `pool_rounds` rounds up to round `number`, which have generated.

    The prompts of several rounds are written to `round-NN/mine/prompts.parquet`.

    Raises:
        DataError: a prompt is not the same in all of the rounds.
    """
    generations, keys, rounds, prompts = [], [], [], []
    for earlier in range(max(1, number - pool_rounds + 1), number + 1):
        name = f"round-{earlier:02d}"
        generated = manifest.stage(f"{name}/generate")
        assert generated is not None
        generations += [folder / made["file"] for made in generated["files"]]
        keys += [made["key"] for made in generated["files"]]
        rounds += [earlier] * len(generated["files"])
        prompts.append(folder / name / "generate" / "prompts.parquet")
    if len(prompts) == 1:
        return Candidates(generations, keys, rounds, prompts[0])
    pooled = folder / f"round-{number:02d}" / "mine" / "prompts.parquet"
    key = digest("pool", keys, [parquet_key(file) for file in prompts])
    if parquet_key(pooled) != key:
        write_parquet(pooled, _same_prompts(prompts, generations), key=key, schema=PROMPTS)
    return Candidates(generations, keys, rounds, pooled)


def _same_prompts(prompts: Iterable[Path], generations: list[Path]) -> pl.DataFrame:
    """The prompts of several rounds, each once. A pair's two responses must answer the same tokens."""
    asked = pl.concat([read_parquet(file, PROMPTS.names()) for file in prompts]).unique(maintain_order=True)
    twice = asked.filter(pl.col("prompt_id").is_duplicated())["prompt_id"]
    if len(twice):
        raise DataError(
            f"prompt_id {twice[0]} is of two prompts in the rounds whose candidates are pooled: give every prompt "
            "an id of its own, or set mine.pool_rounds=1"
        )
    tokens = pl.col("prompt_token_ids").hash()
    sampled = pl.scan_parquet(generations, glob=False).select("prompt_id", tokens).unique().collect()
    apart = sampled.filter(pl.col("prompt_id").is_duplicated())["prompt_id"]
    if len(apart):
        raise DataError(
            f"prompt_id {apart.sort()[0]} has other token ids in one of the pooled rounds than in another, so that "
            "their responses make no pair: the chat template changes with time (a date?), or with the policy. Start a "
            "run with a template that does not, or with mine.pool_rounds=1"
        )
    return asked.sort("prompt_id")


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
    mined = mine_pairs(frame, **asdict(options))
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
