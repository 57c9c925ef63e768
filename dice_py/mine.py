"""Mine preference pairs: the best and the worst response of each prompt, less a length penalty.

The work is Rust's (rust/dice-core). This file names the columns, brings them to numeric types without
copying those that are, and turns the answer into a frame. Only numbers cross: the pairs carry row numbers,
and text is gathered by Polars afterwards.

The penalty (`debias="linear"`): of one prompt's responses, the chosen has the greatest and the rejected the
least `reward - alpha * length`. With `alpha="auto"`, alpha is the one at which the mean of chosen length -
rejected length is nearest zero (DICE, arXiv 2406.09760, section 4.2), found exactly from the break points of
that step function, not on a grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import polars as pl

from dice_py import _native
from dice_py.artefacts import MINED, digest, file_digest, write_json, write_parquet
from dice_py.config import MineConfig
from dice_py.errors import DataError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa

MAX_LENGTH = 2**32 - 1


class ArrowStream(Protocol):
    """Anything with the Arrow PyCapsule interface: pandas, DuckDB, DataFusion, arro3, …"""

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object: ...


Frame: TypeAlias = "pl.DataFrame | pl.LazyFrame | pa.Table | pa.RecordBatchReader | ArrowStream"


@dataclass(frozen=True)
class MinedPairs:
    """What `mine_pairs` found, kept and dropped."""

    pairs: pl.DataFrame
    """One row a pair, by ascending prompt: `prompt_id` (the frame's own dtype), `chosen_row u64`,
    `rejected_row u64` (row numbers of the frame, from zero), `chosen_reward f32`, `rejected_reward f32` (as
    they were), `margin f32` (difference after the penalty), `chosen_length u32`, `rejected_length u32`."""
    alpha: float | None
    """The penalty per unit of length, in units of reward; None for `debias="bucket"`."""
    alpha_low: float | None
    """The least penalty that gives these pairs."""
    alpha_high: float | None
    """The penalty from which on the pairs differ; infinity if there is none."""
    mean_length_gap_before: float
    """Mean of chosen length - rejected length without any debiasing; NaN if there are no pairs."""
    mean_length_gap_after: float
    """The same of the pairs; NaN if there are none."""
    dropped: dict[str, int]
    """Rows that were dropped, each under the first reason that applies: `null`, `not_finite`, `truncated`,
    `too_short`, `too_long`, `too_few_responses`."""
    dropped_prompts: dict[str, int]
    """Prompts that gave no pair: `too_few_responses`; `no_contrast` (all their usable responses agree in
    reward and length)."""
    prompts: int
    """Prompts in the frame."""
    rows: int
    """Rows in the frame."""
    curve: pl.DataFrame
    """The mean length gap as a function of the penalty, at up to about 200 of its steps around the answer:
    `alpha f64`, `mean_length_gap f64` (the exact value from that alpha to the next step). Empty for
    `debias="bucket"`."""

    def summary(self) -> dict[str, Any]:
        """Everything but the frames, ready for JSON (infinity and NaN become None)."""
        numbers = {
            "alpha": self.alpha,
            "alpha_low": self.alpha_low,
            "alpha_high": self.alpha_high,
            "mean_length_gap_before": self.mean_length_gap_before,
            "mean_length_gap_after": self.mean_length_gap_after,
        }
        finite = {k: v if v is not None and math.isfinite(v) else None for k, v in numbers.items()}
        return {
            "pairs": self.pairs.height,
            **finite,
            "dropped": dict(self.dropped),
            "dropped_prompts": dict(self.dropped_prompts),
            "prompts": self.prompts,
            "rows": self.rows,
        }


def mine_pairs(
    frame: Frame,
    *,
    prompt_column: str = "prompt_id",
    reward_column: str = "reward",
    length_column: str = "response_tokens",
    truncated_column: str | None = "auto",
    debias: Literal["none", "linear", "bucket"] = "linear",
    alpha: float | Literal["auto"] = "auto",
    min_responses: int = 2,
    min_length: int | None = None,
    max_length: int | None = None,
    buckets: int = 10,
    bucket_scale: bool = False,
) -> MinedPairs:
    """The best and the worst response of each prompt, less a length penalty.

    `frame` has one row a response, in any order: a Polars DataFrame or LazyFrame (of which only the columns
    named here are collected), a pyarrow Table or RecordBatchReader, or anything with `__arrow_c_stream__`.
    Its columns: prompt (integers, text, or anything with an order; no nulls), reward (a number), length (a
    whole number, in tokens or characters).

    `truncated_column`: a boolean column of responses cut off by the token limit, which are dropped. "auto"
    takes `finish_reason == "length"` where there is a column `finish_reason`; None drops none.

    `debias`:

    - "linear": pairs by `reward - alpha * length`. `alpha` is a number of zero or more, or "auto".
    - "none": pairs by `reward`.
    - "bucket": pairs by `reward - mean`, or with `bucket_scale` `(reward - mean) / std`, with mean and
      population standard deviation over all usable responses in the same of `buckets` length quantiles (cut
      j at the length of rank ceil(j * n / buckets), closed on the right; equal lengths share a bucket; here
      responses count as usable whatever `min_responses` says; std = 0 does not divide).

    Usable responses have a reward and a length, the reward finite (in float32), are not truncated, and have
    `min_length <= length <= max_length`; a prompt needs `min_responses` of them.

    Ties: the shorter response is chosen and the longer rejected, then the lower row. The pairs depend neither
    on the order of rows (but for responses equal in reward and length), nor on chunks or threads.

    With `alpha="auto"` the result's `alpha` is 0 if no penalty is best, else the middle of `alpha_low` and
    `alpha_high`. All floats of `[alpha_low, alpha_high)` give these pairs. If two penalties leave gaps of the
    same size on both sides of zero, the lower is taken.

    Raises UsageError for an option out of range, and DataError for a missing or unsuitable column, a null
    prompt, a negative length, or a frame without rows.
    """
    _check_options(debias, alpha, min_responses, min_length, max_length, buckets)
    named = {"prompt": prompt_column, "reward": reward_column, "length": length_column}
    narrow, truncated = _select(frame, named, truncated_column)
    if narrow.height == 0:
        raise DataError("the frame has no rows: give a table with at least one response")
    keys, native_key = _key(narrow, prompt_column)
    columns = [keys, _reward(narrow, reward_column), _length(narrow, length_column)]
    if truncated is not None:
        columns.append(truncated.alias("truncated"))
    try:
        batch, found = _native.mine(
            # As one struct column the chunks are exported as they are. A frame's own export joins them first.
            narrow.select(columns).to_struct("rows"),
            debias=debias,
            alpha=None if alpha == "auto" else float(alpha),
            min_responses=min_responses,
            min_length=min_length,
            # No length is above this one.
            max_length=None if max_length is None else min(max_length, MAX_LENGTH),
            buckets=buckets,
            bucket_scale=bucket_scale,
        )
    except DataError as error:
        place = ", ".join(f"{role} column '{name}'" for role, name in named.items())
        raise DataError(f"{error} ({place})") from None
    pairs = pl.DataFrame(pl.from_arrow(batch))
    if native_key:
        prompts = pairs["prompt"].alias("prompt_id")
    else:
        prompts = narrow[prompt_column].gather(pairs["chosen_row"]).alias("prompt_id")
    return MinedPairs(
        pairs=pairs.drop("prompt").insert_column(0, prompts),
        alpha=found.alpha,
        alpha_low=found.alpha_low,
        alpha_high=found.alpha_high,
        mean_length_gap_before=found.mean_length_gap_before,
        mean_length_gap_after=found.mean_length_gap_after,
        dropped=dict(found.dropped),
        dropped_prompts=dict(found.dropped_prompts),
        prompts=found.prompts,
        rows=found.rows,
        curve=pl.DataFrame(
            {"alpha": found.curve_alpha, "mean_length_gap": found.curve_gap},
            schema={"alpha": pl.Float64, "mean_length_gap": pl.Float64},
        ),
    )


def _check_options(
    debias: str,
    alpha: float | str,
    min_responses: int,
    min_length: int | None,
    max_length: int | None,
    buckets: int,
) -> None:
    if debias not in ("none", "linear", "bucket"):
        raise UsageError(f"debias is {debias!r}, but must be one of none, linear, bucket")
    number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
    if alpha != "auto" and not (number and math.isfinite(alpha) and alpha >= 0):  # type: ignore[arg-type,operator]
        raise UsageError(f"alpha is {alpha!r}, but must be 'auto' or a finite number of zero or more")
    if min_responses < 2:
        raise UsageError(f"min_responses is {min_responses}, but a pair takes two responses: give 2 or more")
    for name, value in (("min_length", min_length), ("max_length", max_length)):
        if value is not None and value < 0:
            raise UsageError(f"{name} is {value}, but lengths are counts: give zero or more, or nothing")
    if min_length is not None and min_length > (MAX_LENGTH if max_length is None else max_length):
        raise UsageError(f"min_length is {min_length} and max_length {max_length}: no length can be both")
    if buckets < 1:
        raise UsageError(f"buckets is {buckets}: give 1 or more")


def _select(frame: Frame, named: dict[str, str], truncated_column: str | None) -> tuple[pl.DataFrame, pl.Expr | None]:
    """The columns that are needed, and an expression for the truncated rows."""
    auto = truncated_column == "auto"
    flag = "finish_reason" if auto else truncated_column
    wanted = dict.fromkeys(named.values()) | ({} if flag is None else {flag: None})
    lazy, columns = _open(frame, wanted)
    for role, name in named.items():
        if name not in columns:
            raise DataError(_missing(name, columns, f"{role}_column=/--{role}-column"))
    if flag is None or (auto and flag not in columns):
        return lazy.select(list(dict.fromkeys(named.values()))).collect(), None
    if flag not in columns:
        raise DataError(_missing(flag, columns, "truncated_column="))
    narrow = lazy.select(list(wanted)).collect()
    if auto:
        return narrow, pl.col(flag).cast(pl.String) == "length"
    if narrow.schema[flag] != pl.Boolean:
        raise DataError(
            f"column '{flag}' has dtype {narrow.schema[flag]}, but truncated_column= must name a boolean column"
        )
    return narrow, pl.col(flag)


def _missing(name: str, columns: list[str], option: str) -> str:
    return f"column '{name}' not found in the frame; columns are {', '.join(columns)}; name it with {option}"


def _open(frame: Frame, wanted: Iterable[str]) -> tuple[pl.LazyFrame, list[str]]:
    """The frame and the names of all its columns. Of Arrow input only the wanted columns are kept."""
    if isinstance(frame, pl.LazyFrame):
        return frame, frame.collect_schema().names()
    if isinstance(frame, pl.DataFrame):
        return frame.lazy(), frame.columns
    import pyarrow as pa

    if isinstance(frame, pa.RecordBatch):
        frame = pa.Table.from_batches([frame])
    if isinstance(frame, pa.Table):
        reader = frame.to_reader()
    elif isinstance(frame, pa.RecordBatchReader):
        reader = frame
    elif hasattr(frame, "__arrow_c_stream__"):
        reader = pa.RecordBatchReader.from_stream(frame)
    else:
        raise UsageError(
            f"cannot mine a {type(frame).__name__}: give a Polars DataFrame or LazyFrame, a pyarrow Table, "
            "or anything with __arrow_c_stream__"
        )
    names = reader.schema.names
    kept = [name for name in wanted if name in names]
    schema = pa.schema([reader.schema.field(name) for name in kept])
    # Batch by batch, so that text columns of a stream are never all in memory.
    table = pa.Table.from_batches([batch.select(kept) for batch in reader], schema)
    # Not rechunked: that would copy every column.
    return pl.DataFrame(pl.from_arrow(table, rechunk=False)).lazy(), names


def _key(narrow: pl.DataFrame, name: str) -> tuple[pl.Expr, bool]:
    """The prompt column as integers, and whether it is so already."""
    dtype = narrow.schema[name]
    key = pl.col(name)
    if dtype.is_integer() and dtype not in (pl.Int128, pl.UInt128):
        return key.alias("prompt"), True
    if dtype in (pl.Categorical, pl.Enum):
        # By text: the physical order of a categorical depends on what was read before.
        key = key.cast(pl.String)
    elif dtype.is_nested() or dtype in (pl.Object, pl.Null, pl.Unknown):
        raise DataError(f"prompt column '{name}' has dtype {dtype}, which has no order: give integers or text")
    return key.rank("dense").alias("prompt"), False


def _reward(narrow: pl.DataFrame, name: str) -> pl.Expr:
    dtype = narrow.schema[name]
    if dtype in (pl.Float32, pl.Float64):
        return pl.col(name).alias("reward")
    if dtype.is_numeric() or dtype == pl.Null:
        return pl.col(name).cast(pl.Float64).alias("reward")
    raise DataError(f"reward column '{name}' has dtype {dtype}, but must be numeric: cast it to Float32 first")


def _length(narrow: pl.DataFrame, name: str) -> pl.Expr:
    dtype = narrow.schema[name]
    if dtype.is_integer() and dtype not in (pl.Int128, pl.UInt128):
        return pl.col(name).alias("length")
    if dtype == pl.Null:
        return pl.col(name).cast(pl.UInt32).alias("length")
    raise DataError(f"length column '{name}' has dtype {dtype}, but must hold whole numbers: cast it to UInt32 first")


def mine(config: MineConfig, *, generations: list[Path], scores: list[Path], out: Path, key: str) -> dict[str, Any]:
    """Stage 3: mines the pairs of one round's shards into `out/mined.parquet`; row numbers count through them.

    Beside it, `mining.json` has the summary and the curve of mean length gap against alpha.

    Raises:
        DataError: generations and scores do not belong together, or no pair is left (saying what was dropped).
    """
    length = "response_tokens" if config.length == "tokens" else "response_chars"
    responses = pl.scan_parquet(generations, glob=False).select("prompt_id", length, "finish_reason").collect()
    rewards = pl.scan_parquet(scores, glob=False).select("reward").collect()
    if responses.height != rewards.height:
        raise DataError(
            f"{generations[0].parent} has {responses.height} responses, but {scores[0].parent} {rewards.height} "
            "scores: they are not of one round; score these generations"
        )
    mined = mine_pairs(
        responses.hstack(rewards),
        length_column=length,
        debias=config.debias,
        alpha=config.alpha,
        min_responses=config.min_responses,
        min_length=config.min_length,
        max_length=config.max_length,
        buckets=config.buckets,
        bucket_scale=config.bucket_scale,
    )
    if mined.pairs.is_empty():
        raise DataError(
            f"no pair is left of {mined.rows} responses to {mined.prompts} prompts; dropped rows: {mined.dropped}, "
            f"prompts: {mined.dropped_prompts}. Raise generate.max_new_tokens if most were truncated, or loosen the "
            "mine.* filters"
        )
    summary = {
        "length": config.length,
        "debias": config.debias,
        **mined.summary(),
        "curve": mined.curve.to_dict(as_series=False),
    }
    write_json(out / "mining.json", summary)
    write_parquet(out / "mined.parquet", mined.pairs, key=key, schema=MINED)
    return {name: value for name, value in summary.items() if name != "curve"}


def mine_file(scored: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Mines one Parquet file of a user's own into `out`, with the keywords of `mine_pairs`; returns the summary.

    Raises:
        DataError: the file is absent, not Parquet, empty, or lacks a column.
    """
    if not scored.is_file():
        raise DataError(f"{scored} does not exist (or is not a file)")
    try:
        mined = mine_pairs(pl.scan_parquet(scored, glob=False), **options)
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{scored} cannot be read as Parquet: {error}") from None
    except DataError as error:
        raise DataError(f"{scored}: {error}") from None
    write_parquet(out, mined.pairs, key=digest("mine", file_digest(scored), options), meta=mined.summary())
    return mined.summary()
