"""Stage 4, replay: mix a share of offline preference pairs into the mined ones, on prompts that were not mined.

The share is gamma = replayed / (mined + replayed), as in DICE (arXiv 2406.09760, section 4.3). `mix_replay` and
`sample_replay` choose rows of one buffer; replay/mix.py those of several, replay/weights.py has the
formulas, replay/sampling.py the draw, replay/buffer.py what a run keeps of its earlier rounds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from dice_py.config.shared import ModelConfig
from dice_py.config.stages import BufferConfig, ReplayConfig, RoundsBufferConfig, ScoreConfig
from dice_py.data import prompt_key
from dice_py.errors import DataError, UsageError
from dice_py.events import Report, no_report
from dice_py.models.tokenization import encode_pairs, load_tokenizer, stop_token_ids
from dice_py.replay.buffer import ReplayBuffer
from dice_py.replay.mined import gather_mined
from dice_py.replay.mix import (
    OFFLINE_BUFFER,
    ROUNDS_BUFFER,
    BufferMix,
    OfflineBuffer,
    mix_buffers,
)
from dice_py.scoring.pairs import score_pairs
from dice_py.storage.parquet import read_parquet, write_parquet
from dice_py.storage.schemas import PAIRS, TRAINING_SET


def replay(
    config: ReplayConfig,
    score_config: ScoreConfig,
    models: ModelConfig,
    *,
    policy: Path,
    mined: Path | None,
    generations: list[Path],
    scores: list[Path],
    prompts: Path | None,
    offline: Path | None,
    out: Path,
    seed: int,
    key: str,
    buffers: dict[str, Path] | None = None,
    rounds_buffer: ReplayBuffer | None = None,
    round_number: int | None = None,
    report: Report = no_report,
) -> dict[str, Any]:
    """Stage 4: mixes the share gamma of offline pairs into the mined ones: `out/training_set.parquet`.

    The replayed pairs of files are tokenised once, here; those of the rounds' buffer keep the tokens that were
    sampled. All of them are scored in one pass of `policy`; the mined ones have their token ids and
    log-probabilities already. The rows are in order of the mix: mined first, then replayed, buffer by buffer (the
    trainer shuffles). `source` is "mined", "replay" (from `offline`), or "replay:NAME".

    Args:
        mined, generations, scores, prompts: the mined pairs, the shards that their row numbers count through,
            and the prompts that were sampled on. None and empty: the training set is of offline pairs alone.
        offline: Parquet with `prompt`, `chosen`, `rejected` (messages), `key` and what the weights and strata
            need of `weight`, `margin`, `round`, `source` (dice_py.data.read_pairs); None where there is none.
        buffers: the same for the names of `config.buffers`.
        rounds_buffer: what earlier rounds mined (buffer "rounds"); left out of a round before which there is
            nothing in it.
        round_number: the current round, from which ages are counted.

    Returns:
        The summary of the mix: counts, requested and reached share, shortfall, of each buffer if there are several.

    Raises:
        DataError: too few pairs with `config.on_shortfall="error"`, or none at all; a column or value that the
            weights or strata cannot use.
    """
    pools = _pools(config, offline, buffers or {}, rounds_buffer, round_number)
    if mined is None or prompts is None:
        pairs = asked = pl.DataFrame(schema={"prompt_id": pl.UInt32})
        keyed = pl.DataFrame(schema={"key": pl.String})
        gamma: float = 1.0
        total: int | None = config.total
        if total is None:
            if len(pools) > 1:
                raise UsageError(
                    f"a training set without mined pairs takes all of one buffer, but there are {len(pools)}: say how "
                    "many pairs with replay.total"
                )
            total = sum(pool.pairs.height for pool in pools)
    else:
        pairs = read_parquet(mined)
        asked = read_parquet(prompts, ["prompt_id", "messages"])
        asked = asked.join(pairs.select("prompt_id"), on="prompt_id", how="semi")
        keys = asked.select("prompt_id", key=pl.col("messages").map_elements(_message_key, return_dtype=pl.String))
        keyed = pairs.select("prompt_id").join(keys, on="prompt_id", how="left", maintain_order="left")
        gamma, total = config.gamma, config.total
        if gamma > 0.0 and not pools and rounds_buffer is not None:
            report("note", text="no earlier round to replay from: this round trains on mined pairs alone")
            gamma = 0.0
    mix = mix_buffers(
        keyed,
        pools,
        gamma=gamma,
        seed=seed,
        key_column="key",
        current_round=round_number,
        stratify_by=config.stratify_by,
        allocation=config.allocation,
        length_buckets=config.length_buckets,
        total=total,
        on_shortfall=config.on_shortfall,
    )
    parts = []
    if mix.mined:
        parts.append(gather_mined(pairs[mix.mined_rows], generations, scores, asked))
    if mix.replay:
        drawn = _with_tokens(pools, mix, policy, models)
        scored = score_pairs(score_config, models, policy=policy, pairs=drawn, report=report)
        parts.append(
            drawn.hstack(scored).rename({"chosen_logp": "ref_chosen_logps", "rejected_logp": "ref_rejected_logps"})
        )
    if not parts:
        raise DataError(
            "the training set is empty: no pair was mined and none replayed; lower replay.gamma, or give offline "
            "pairs on prompts that are not mined"
        )
    if any(mix.shortfall.values()):
        report("note", text=_shortfall_note(mix, gamma))
    training = pl.concat([part.select(TRAINING_SET.names()) for part in parts], how="vertical_relaxed")
    write_parquet(out / "training_set.parquet", training, key=key, schema=TRAINING_SET, meta=mix.summary())
    return mix.summary()


def _pools(
    config: ReplayConfig,
    offline: Path | None,
    buffers: dict[str, Path],
    rounds_buffer: ReplayBuffer | None,
    round_number: int | None,
) -> list[OfflineBuffer]:
    """What there is to replay from: data.replay, then the named buffers, then the rounds' own."""
    # Of pairs that are read from a file there are no tokens before they are drawn.
    characters = pl.col("chosen").list.get(0).struct.field("content").str.len_chars()

    def pool(
        name: str, pairs: pl.DataFrame, settings: ReplayConfig | BufferConfig | RoundsBufferConfig, length: pl.Expr
    ) -> OfflineBuffer:
        return OfflineBuffer(
            name,
            pairs.with_columns(length=length) if config.stratify_by == "length" else pairs,
            share=settings.share,
            weight_column="weight" if "weight" in pairs.columns else None,
            margin_power=settings.margin_power,
            half_life=settings.half_life,
        )

    pools = [] if offline is None else [pool(OFFLINE_BUFFER, read_parquet(offline), config, characters)]
    pools += [pool(name, read_parquet(path), config.buffers[name], characters) for name, path in buffers.items()]
    if rounds_buffer is not None and config.buffer is not None and rounds_buffer.rounds(round_number):
        earlier = rounds_buffer.read(round_number)
        pools.append(pool(ROUNDS_BUFFER, earlier, config.buffer, pl.col("chosen_ids").list.len()))
    return pools


def _with_tokens(pools: list[OfflineBuffer], mix: BufferMix, policy: Path, models: ModelConfig) -> pl.DataFrame:
    """The pairs that were drawn, as `PAIRS` and `source`. Stored tokens are kept; what has none is tokenised."""
    drawn = []
    tokenizer = None
    for pool in pools:
        pairs = pool.pairs[mix.draws[pool.name].rows]
        if pool.name != ROUNDS_BUFFER and pairs.height:
            tokenizer = load_tokenizer(policy, models) if tokenizer is None else tokenizer
            pairs = encode_pairs(pairs, tokenizer, stop_token_ids(policy, tokenizer))
        if pairs.height:
            label = OFFLINE_BUFFER if pool.name == OFFLINE_BUFFER else f"{OFFLINE_BUFFER}:{pool.name}"
            drawn.append(pairs.select(*PAIRS.names(), source=pl.lit(label)))
    return pl.concat(drawn, rechunk=True)


def _shortfall_note(mix: BufferMix, gamma: float) -> str:
    lacking = [
        f"{name} {mix.requested[name] - len(found.rows)}"
        for name, found in mix.draws.items()
        if len(found.rows) < mix.requested[name]
    ]
    of = f" ({', '.join(lacking)})" if len(mix.draws) > 1 else ""
    hint = ""
    if ROUNDS_BUFFER in mix.draws and len(mix.draws[ROUNDS_BUFFER].rows) < mix.requested[ROUNDS_BUFFER]:
        hint = (
            "; pairs of earlier rounds on prompts that were mined again are left out: with data.prompts_per_round the "
            "rounds' prompts differ"
        )
    return (
        f"too few pairs for a share of {gamma}: short of {mix.shortfall['replay']} offline{of} and "
        f"{mix.shortfall['mined']} mined ones; the share reached is {mix.reached_share:.3f}{hint}"
    )


def _message_key(messages: pl.Series) -> str:
    return prompt_key(messages.to_list())
