"""The responses that a round mines: its own, or those of several rounds in one pool."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.errors import DataError
from dice_py.events import Report, no_report
from dice_py.runs.folder import round_name
from dice_py.storage.files import Manifest
from dice_py.storage.integrity import is_kept
from dice_py.storage.keys import digest
from dice_py.storage.parquet import parquet_key, parquet_meta, read_parquet, write_parquet
from dice_py.storage.removed import check_not_removed, was_removed
from dice_py.storage.schemas import PROMPTS


@dataclass(frozen=True)
class Candidates:
    """The shards that a round scores and mines, those of the oldest round first."""

    generations: list[Path]
    keys: list[str]
    """The key of each shard with the digest of its samples, since a GPU may sample others under the same key."""
    rounds: list[int]
    """The round that sampled each shard."""
    has_logps: list[bool]
    """Whether each shard has the log-probabilities of sampling: given responses may lack them."""
    prompts: Path
    """The prompts of all shards, each once."""


def candidates(
    folder: Path, manifest: Manifest, number: int, pool_rounds: int, report: Report = no_report
) -> Candidates:
    """The shards of the last `pool_rounds` rounds up to round `number`; all of these have generated.

    The prompts of several rounds are written to `round-NN/mine/prompts.parquet`.

    Raises:
        DataError: a prompt differs between the rounds.
    """
    generations, keys, rounds, prompts = [], [], [], []
    has_logps: list[bool] = []
    for earlier in range(max(1, number - pool_rounds + 1), number + 1):
        name = round_name(earlier)
        generated = manifest.stage(f"{name}/generate")
        assert generated is not None
        for shard in generated["files"]:
            generations.append(folder / shard["file"])
            keys.append(_content_key(shard["key"], generations[-1]))
            has_logps.append(_meta(generations[-1]).get("has_logps", True))
        rounds += [earlier] * len(generated["files"])
        prompts.append(folder / name / "generate" / "prompts.parquet")
    if len(prompts) == 1:
        return Candidates(generations, keys, rounds, has_logps, prompts[0])
    pooled = folder / round_name(number) / "mine" / "prompts.parquet"
    key = digest("pool", keys, [parquet_key(file) for file in prompts])
    if not is_kept(pooled, key, report):
        write_parquet(pooled, _same_prompts(prompts, generations), key=key, schema=PROMPTS)
    return Candidates(generations, keys, rounds, has_logps, pooled)


def _content_key(key: str, shard: Path) -> str:
    """`key` with the digest of the samples; `key` alone where an earlier version, which wrote no digest, sampled."""
    samples = _meta(shard).get("samples")
    return key if samples is None else f"{key} {samples}"


def _meta(shard: Path) -> dict[str, Any]:
    """What a shard says of itself, or said before it was removed."""
    removed = was_removed(shard)
    meta = parquet_meta(shard) if removed is None else removed.files[shard.name].get("meta")
    return meta if isinstance(meta, dict) else {}


def _same_prompts(prompts: Iterable[Path], generations: list[Path]) -> pl.DataFrame:
    """The prompts of several rounds, each once. A pair's two responses must answer the same tokens."""
    for shard in generations:
        check_not_removed(shard)
    pooled = pl.concat([read_parquet(file, PROMPTS.names()) for file in prompts], how="vertical_relaxed").unique(
        maintain_order=True
    )
    repeated = pooled.filter(pl.col("prompt_id").is_duplicated())["prompt_id"]
    if len(repeated):
        raise DataError(
            f"prompt_id {repeated[0]} belongs to two different prompts in the pooled rounds; give every prompt its own "
            "id, or set mine.pool_rounds=1"
        )
    tokens = pl.col("prompt_token_ids").hash()
    sampled = pl.scan_parquet(generations, glob=False).select("prompt_id", tokens).unique().collect()
    differing = sampled.filter(pl.col("prompt_id").is_duplicated())["prompt_id"]
    if len(differing):
        raise DataError(
            f"prompt_id {differing.sort()[0]} has different token ids in two of the pooled rounds, so that their "
            "responses cannot form a pair: the chat template changes with time (a date?) or with the policy. Start a "
            "run with a template that does not change, or with mine.pool_rounds=1"
        )
    return pooled.sort("prompt_id")
