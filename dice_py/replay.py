"""Mix a share of offline preference pairs into the mined ones, on prompts that were not mined.

The share is gamma = replayed / (mined + replayed), as in DICE (arXiv 2406.09760, section 4.3). Sampling is
Rust's (rust/dice-core/src/replay.rs): without replacement, by ChaCha8 seeded with `seed`, over row numbers
alone, so that the result depends on nothing but the rows, their order and the seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import polars as pl

from dice_py import _native
from dice_py.artefacts import TRAINING_SET, Report, no_report, read_parquet, write_parquet
from dice_py.config import ModelConfig, ReplayConfig, ScoreConfig
from dice_py.data import prompt_key
from dice_py.errors import DataError, UsageError
from dice_py.models import encode_pairs, load_tokenizer, stop_token_ids
from dice_py.score import score_pairs

# Numbers of the generator's streams: draws that share a seed must not share random numbers.
_OFFLINE, _MINED = 0, 1


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
        }


def sample_replay(
    offline_keys: pl.Series,
    n: int,
    seed: int,
    *,
    exclude: pl.Series | None = None,
    weights: pl.Series | None = None,
    on_shortfall: Literal["error", "record"] = "error",
) -> pl.Series:
    """Row numbers (u64, ascending) of `n` rows drawn without replacement.

    `offline_keys`: the prompt of each row (integers or text, no nulls). Rows whose key is in `exclude` are
    left out. `weights` (numbers of zero or more): each draw takes a row with probability in proportion to
    its weight among those that are left (algorithm A-ExpJ); rows of weight zero are never drawn. `seed`: 0 to
    2**64 - 1.

    Fewer rows than `n`: DataError, or with `on_shortfall="record"` all there are. A weight that is negative,
    NaN, infinite or null, or a null key: DataError.
    """
    if n < 0:
        raise UsageError(f"n is {n}: give zero or more")
    rows, candidates = _sample(offline_keys, n, seed, exclude, weights, _OFFLINE)
    if len(rows) < n and on_shortfall == "error":
        raise DataError(
            f"{n} offline rows were asked for, but only {candidates} can be drawn (of {len(offline_keys)}; "
            "the others are on excluded prompts or have weight zero): ask for fewer or give more offline rows"
        )
    return rows


def mix_replay(
    mined: pl.DataFrame,
    offline: pl.DataFrame,
    *,
    gamma: float,
    seed: int,
    key_column: str = "prompt_id",
    weight_column: str | None = None,
    total: int | None = None,
    on_shortfall: Literal["error", "record"] = "error",
) -> ReplayMix:
    """Choose the rows of a training set with a share `gamma` of offline pairs.

    Both frames have `key_column`, the prompt of each row (integers or text). Offline rows on any prompt of
    `mined`, kept or not, are left out. `weight_column` of `offline`: see `sample_replay`.

    `total=None`: all M mined rows, and round(gamma / (1 - gamma) * M) offline ones; gamma = 1: M offline rows
    and no mined ones. `total=T`: round(gamma * T) offline rows, and as many mined ones as make it T, drawn
    uniformly. Halves are rounded up.

    Too few rows: DataError, or with `on_shortfall="record"` all there are, and the shortfall in the result.
    `gamma` outside 0..1 or NaN, or a negative `total`: UsageError.
    """
    if not (0.0 <= gamma <= 1.0):
        raise UsageError(f"gamma is {gamma}, but it is the share of replayed pairs: give a number from 0 to 1")
    if total is not None and total < 0:
        raise UsageError(f"total is {total}: give zero or more, or nothing to keep all mined pairs")
    if on_shortfall not in ("error", "record"):
        raise UsageError(f"on_shortfall is {on_shortfall!r}, but must be one of error, record")
    for frame, name in ((mined, "mined"), (offline, "offline")):
        if key_column not in frame.columns:
            raise DataError(
                f"column '{key_column}' not found in the {name} pairs; columns are "
                f"{', '.join(frame.columns)}; name it with key_column="
            )
    if weight_column is not None and weight_column not in offline.columns:
        raise DataError(
            f"column '{weight_column}' not found in the offline pairs; columns are "
            f"{', '.join(offline.columns)}; name it with weight_column="
        )
    want_mined, want_replay = _counts(mined.height, gamma, total)
    weights = None if weight_column is None else offline[weight_column]
    keys = mined[key_column]
    replay_rows, candidates = _sample(offline[key_column], want_replay, seed, keys, weights, _OFFLINE)
    row_numbers = pl.arange(mined.height, dtype=pl.UInt64, eager=True)
    mined_rows, _ = _sample(row_numbers, want_mined, seed, None, None, _MINED)
    mix = ReplayMix(
        mined_rows=mined_rows,
        replay_rows=replay_rows,
        candidates=candidates,
        requested_share=float(gamma),
        reached_share=_share(len(replay_rows), len(mined_rows)),
        requested_mined=want_mined,
        requested_replay=want_replay,
    )
    if on_shortfall == "error" and any(mix.shortfall.values()):
        raise DataError(
            f"a share of {gamma} takes {want_mined} mined and {want_replay} offline pairs, but there are "
            f"{mined.height} mined ones, and {candidates} offline ones on prompts that were not mined (of "
            f"{offline.height}): lower gamma{'' if total is None else ' or total'}, give more offline pairs, "
            "or take what there is with on_shortfall='record'"
        )
    return mix


def _counts(mined: int, gamma: float, total: int | None) -> tuple[int, int]:
    """Rows asked for: mined, replay."""
    if total is not None:
        replay = math.floor(gamma * total + 0.5)
        return total - replay, replay
    if gamma == 1.0:
        return 0, mined
    return mined, math.floor(gamma / (1.0 - gamma) * mined + 0.5)


def _share(replay: int, mined: int) -> float:
    return replay / (replay + mined) if replay + mined else math.nan


def _sample(
    keys: pl.Series,
    count: int,
    seed: int,
    exclude: pl.Series | None,
    weights: pl.Series | None,
    stream: int,
) -> tuple[pl.Series, int]:
    """Row numbers, and how many rows there were to choose from."""
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
        count=min(count, 2**64 - 1),
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


def gather_mined(
    mined: pl.DataFrame, generations: list[Path], scores: list[Path], prompts: pl.DataFrame
) -> pl.DataFrame:
    """The mined pairs as a training set: stored token ids, messages, and the log-probabilities already scored.

    The policy that scored the responses is the one that training starts from, so its `logp` is the
    reference's log-probability in DPO.
    """
    wanted = pl.concat([mined["chosen_row"], mined["rejected_row"]]).cast(pl.UInt32).unique().to_frame("row")
    columns = ["prompt_token_ids", "token_ids", "response"]
    sampled = pl.scan_parquet(generations, glob=False, row_index_name="row").select("row", *columns)
    logps = pl.scan_parquet(scores, glob=False, row_index_name="row").select("row", "logp")
    rows = sampled.join(wanted.lazy(), on="row", how="semi").join(logps, on="row", how="left").collect()
    answer = pl.concat_list(pl.struct(role=pl.lit("assistant"), content="response"))

    def side(name: str, logp: str) -> pl.DataFrame:
        picked = rows.select(
            "row", pl.col("token_ids").alias(f"{name}_ids"), answer.alias(name), pl.col("logp").alias(logp)
        )
        keys = mined.select(pl.col(f"{name}_row").cast(pl.UInt32).alias("row"))
        return keys.join(picked, on="row", how="left", maintain_order="left").drop("row")

    prompt_ids = mined.select(pl.col("chosen_row").cast(pl.UInt32).alias("row")).join(
        rows.select("row", prompt_ids="prompt_token_ids"), on="row", how="left", maintain_order="left"
    )
    messages = mined.select("prompt_id").join(
        prompts.select("prompt_id", prompt="messages"), on="prompt_id", how="left", maintain_order="left"
    )
    return pl.concat(
        [
            messages.select("prompt"),
            prompt_ids.select("prompt_ids"),
            side("chosen", "ref_chosen_logps"),
            side("rejected", "ref_rejected_logps"),
        ],
        how="horizontal",
    ).with_columns(source=pl.lit("mined"))


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
    report: Report = no_report,
) -> dict[str, Any]:
    """Stage 4: mixes the share gamma of offline pairs into the mined ones: `out/training_set.parquet`.

    The replayed pairs are tokenised once, here, and scored in one pass of `policy`; the mined ones have their
    token ids and log-probabilities already. The rows are in order of the mix: mined first, then replayed (the
    trainer shuffles).

    Args:
        mined, generations, scores, prompts: the mined pairs, the shards that their row numbers count through,
            and the prompts that were sampled on. None and empty: the training set is of offline pairs alone.
        offline: Parquet with `prompt`, `chosen`, `rejected` (messages), `key` and perhaps `weight`
            (dice_py.data.read_pairs); None only where gamma is 0.

    Returns:
        The summary of the mix: counts, requested and reached share, shortfall.
    """
    pool = read_parquet(offline) if offline is not None else pl.DataFrame(schema={"key": pl.String})
    if mined is None or prompts is None:
        pairs = asked = pl.DataFrame(schema={"prompt_id": pl.UInt32})
        keyed = pl.DataFrame(schema={"key": pl.String})
        gamma: float = 1.0
        total: int | None = config.total or pool.height
    else:
        pairs = read_parquet(mined)
        asked = read_parquet(prompts, ["prompt_id", "messages"])
        asked = asked.join(pairs.select("prompt_id"), on="prompt_id", how="semi")
        keys = asked.select("prompt_id", key=pl.col("messages").map_elements(_message_key, return_dtype=pl.String))
        keyed = pairs.select("prompt_id").join(keys, on="prompt_id", how="left", maintain_order="left")
        gamma, total = config.gamma, config.total
    mix = mix_replay(
        keyed,
        pool,
        gamma=gamma,
        seed=seed,
        key_column="key",
        weight_column="weight" if "weight" in pool.columns else None,
        total=total,
        on_shortfall=config.on_shortfall,
    )
    parts = []
    if mix.mined:
        parts.append(gather_mined(pairs[mix.mined_rows], generations, scores, asked))
    if mix.replay:
        tokenizer = load_tokenizer(policy, models)
        drawn = encode_pairs(pool[mix.replay_rows], tokenizer, stop_token_ids(policy, tokenizer))
        scored = score_pairs(score_config, models, policy=policy, pairs=drawn, report=report)
        parts.append(
            drawn.hstack(scored)
            .rename({"chosen_logp": "ref_chosen_logps", "rejected_logp": "ref_rejected_logps"})
            .with_columns(source=pl.lit("replay"))
        )
    if not parts:
        raise DataError(
            "the training set is empty: no pair was mined and none replayed; lower replay.gamma, or give offline "
            "pairs on prompts that are not mined"
        )
    if any(mix.shortfall.values()):
        report(
            "note",
            text=f"too few pairs for a share of {gamma}: short of {mix.shortfall['replay']} offline and "
            f"{mix.shortfall['mined']} mined ones; the share reached is {mix.reached_share:.3f}",
        )
    training = pl.concat([part.select(TRAINING_SET.names()) for part in parts], how="vertical_relaxed")
    write_parquet(out / "training_set.parquet", training, key=key, schema=TRAINING_SET, meta=mix.summary())
    return mix.summary()


def _message_key(messages: pl.Series) -> str:
    return prompt_key(messages.to_list())
