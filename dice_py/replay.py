"""Stage 4, replay: mix a share of offline preference pairs into the mined ones, on prompts that were not mined.

The share is gamma = replayed / (mined + replayed), as in DICE (arXiv 2406.09760, section 4.3). `mix_replay` and
`sample_replay` choose rows of one buffer; dice_py/replay_mix.py those of several, dice_py/replay_weights.py has the
formulas, dice_py/replay_draw.py the draw, dice_py/replay_buffer.py what a run keeps of its earlier rounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.artefacts import PAIRS, TRAINING_SET, Report, no_report, read_parquet, write_parquet
from dice_py.config import BufferConfig, ModelConfig, ReplayConfig, RoundsBufferConfig, ScoreConfig
from dice_py.data import prompt_key
from dice_py.errors import DataError, UsageError
from dice_py.models import encode_pairs, load_tokenizer, stop_token_ids
from dice_py.replay_buffer import ReplayBuffer, gather_mined
from dice_py.replay_draw import draw
from dice_py.replay_mix import (
    OFFLINE_BUFFER,
    ROUNDS_BUFFER,
    BufferMix,
    OfflineBuffer,
    OnShortfall,
    Strata,
    drawn_by_stratum,
    mix_buffers,
    refuse_shortfall,
)
from dice_py.replay_weights import Allocation
from dice_py.score import score_pairs


@dataclass(frozen=True)
class ReplayMix:
    """Which rows make up a training set, and how near it came to what was asked for."""

    mined_rows: pl.Series
    """Row numbers of the mined frame that are kept, ascending (u64)."""
    replay_rows: pl.Series
    """Row numbers of the offline frame that were drawn, ascending (u64)."""
    candidates: int
    """Offline rows that could have been drawn."""
    requested_share: float
    """gamma as asked for."""
    reached_share: float
    """replayed / (mined + replayed); NaN if there is nothing at all."""
    requested_mined: int
    """Mined rows asked for."""
    requested_replay: int
    """Offline rows asked for."""
    strata: pl.DataFrame | None = None
    """`stratum`, `candidates u64`, `drawn u64`; None where the draw was not stratified."""

    @property
    def mined(self) -> int:
        """Mined rows kept."""
        return len(self.mined_rows)

    @property
    def replay(self) -> int:
        """Offline rows drawn."""
        return len(self.replay_rows)

    @property
    def shortfall(self) -> dict[str, int]:
        """Rows that were asked for and are not there: `mined` and `replay`, zero where all are."""
        return {"mined": self.requested_mined - self.mined, "replay": self.requested_replay - self.replay}

    def summary(self) -> dict[str, Any]:
        """The counts and shares, ready for JSON."""
        return {
            "mined": self.mined,
            "replay": self.replay,
            "candidates": self.candidates,
            "requested_share": self.requested_share,
            "reached_share": None if math.isnan(self.reached_share) else self.reached_share,
            "shortfall": self.shortfall,
        } | ({} if self.strata is None else {"strata": drawn_by_stratum(self.strata)})


def sample_replay(
    offline_keys: pl.Series,
    n: int,
    seed: int,
    *,
    exclude: pl.Series | None = None,
    weights: pl.Series | None = None,
    strata: pl.Series | None = None,
    allocation: Allocation = "proportional",
    on_shortfall: OnShortfall = "error",
) -> pl.Series:
    """Row numbers (u64, ascending) of `n` rows drawn without replacement.

    `offline_keys`: the prompt of each row (integers or text, no nulls). Rows whose key is in `exclude` are
    left out. `weights` (numbers of zero or more): each draw takes a row with probability in proportion to
    its weight among those that are left (algorithm A-ExpJ); rows of weight zero are never drawn
    (dice_py/replay_weights.py has weights by margin and by age). `seed`: 0 to 2**64 - 1.

    `strata` (integers, booleans or text, no nulls; `dice_py.replay_weights.length_buckets` makes them of lengths):
    `n` is shared out over the strata, "proportional" to the rows that can be drawn of each (largest remainder), or
    "equal", where what a stratum lacks goes to the others. Inside each the rows are drawn by weight.

    Fewer rows than `n`: DataError, or with `on_shortfall="record"` all there are. A weight that is negative,
    NaN, infinite or null, or a null key or stratum: DataError.
    """
    if n < 0:
        raise UsageError(f"n is {n}: give zero or more")
    found = draw(offline_keys, n, seed, exclude=exclude, weights=weights, strata=strata, allocation=allocation)
    if len(found.rows) < n and on_shortfall == "error":
        raise DataError(
            f"{n} offline rows were asked for, but only {found.candidates} can be drawn (of {len(offline_keys)}; "
            "the others are on excluded prompts or have weight zero): ask for fewer or give more offline rows"
        )
    return found.rows


def mix_replay(
    mined: pl.DataFrame,
    offline: pl.DataFrame,
    *,
    gamma: float,
    seed: int,
    key_column: str = "prompt_id",
    weight_column: str | None = None,
    margin_power: float = 0.0,
    margin_column: str = "margin",
    half_life: float | None = None,
    round_column: str = "round",
    current_round: int | None = None,
    stratify_by: Strata = "none",
    allocation: Allocation = "proportional",
    length_column: str = "length",
    length_buckets: int = 4,
    source_column: str = "source",
    total: int | None = None,
    on_shortfall: OnShortfall = "error",
) -> ReplayMix:
    """Choose the rows of a training set with a share `gamma` of offline pairs.

    Both frames have `key_column`, the prompt of each row (integers or text). Offline rows on any prompt of
    `mined`, kept or not, are left out.

    Weights of the offline rows (the product of what is chosen; see `sample_replay` for the draw):

    - `weight_column`: numbers of zero or more;
    - `margin_power` above 0: max(margin, 0)^margin_power, of `margin_column`;
    - `half_life`: 2^(-age / half_life), age = `current_round` - round, of `round_column`.

    `stratify_by`: "length" draws by `length_buckets` exact quantiles of `length_column` (of all offline rows), and
    "source" by the values of `source_column`. `allocation`: see `sample_replay`. Weights hold inside strata.

    `total=None`: all M mined rows, and round(gamma / (1 - gamma) * M) offline ones; gamma = 1: M offline rows
    and no mined ones. `total=T`: round(gamma * T) offline rows, and as many mined ones as make it T, drawn
    uniformly. Halves are rounded up.

    Too few rows: DataError, or with `on_shortfall="record"` all there are, and the shortfall in the result.
    `gamma` outside 0..1 or NaN, or a negative `total`: UsageError.
    """
    if on_shortfall not in ("error", "record"):
        raise UsageError(f"on_shortfall is {on_shortfall!r}, but must be one of error, record")
    buffer = OfflineBuffer(
        OFFLINE_BUFFER,
        offline,
        weight_column=weight_column,
        margin_power=margin_power,
        half_life=half_life,
        margin_column=margin_column,
        round_column=round_column,
    )
    found = mix_buffers(
        mined,
        [buffer],
        gamma=gamma,
        seed=seed,
        key_column=key_column,
        current_round=current_round,
        stratify_by=stratify_by,
        allocation=allocation,
        length_column=length_column,
        length_buckets=length_buckets,
        source_column=source_column,
        total=total,
        on_shortfall="record",
    )
    drawn = found.draws[OFFLINE_BUFFER]
    mix = ReplayMix(
        mined_rows=found.mined_rows,
        replay_rows=drawn.rows,
        candidates=drawn.candidates,
        requested_share=found.requested_share,
        reached_share=found.reached_share,
        requested_mined=found.requested_mined,
        requested_replay=found.requested[OFFLINE_BUFFER],
        strata=drawn.strata,
    )
    if on_shortfall == "error":
        refuse_shortfall(found, gamma, mined.height, {OFFLINE_BUFFER: offline.height}, total)
    return mix


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
