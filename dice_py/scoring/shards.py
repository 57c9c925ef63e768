"""Scores shards of generations: the work of one group of devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl

from dice_py.compute.dispatch import ShardQueue
from dice_py.config.shared import ModelConfig
from dice_py.config.stages import ScoreConfig
from dice_py.errors import DataError
from dice_py.events import Report
from dice_py.models.loading import held_model
from dice_py.storage.parquet import read_parquet, write_parquet
from dice_py.storage.schemas import SCORES
from dice_py.timing import timed

if TYPE_CHECKING:
    from dice_py.scoring.packing import Tokens


Role = Literal["reference", "policy"]


@dataclass(frozen=True)
class Shard:
    """One file of generations on its way: `halves` keep a model's sums until both are there."""

    generations: Path
    out: Path
    half: Path
    key: str
    sampled: bool
    """True when the policy that scores is the one that sampled it."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns of token ids."""

    prompt: str = "prompt_token_ids"
    response: str = "token_ids"


def token_arrays(frame: pl.DataFrame, column: str, place: Path | str) -> list[np.ndarray]:
    """A column of lists of token ids as arrays, which share their memory.

    Raises:
        DataError: the column is no list of integers, or holds nulls.
    """
    series = frame[column]
    if not (isinstance(series.dtype, pl.List) and series.dtype.inner.is_integer()):
        raise DataError(
            f"{place}: column {column!r} is {series.dtype}, not a list of token ids; the scorer takes "
            "the tokens as they were sampled, and never tokenises text again"
        )
    flat = series.explode(empty_as_null=False)
    if series.null_count() or flat.null_count():
        raise DataError(f"{place}: column {column!r} holds nulls; every response needs its token ids")
    values = flat.cast(pl.Int64).to_numpy()
    if not len(series):
        return []
    return np.split(values, series.list.len().to_numpy().cumsum()[:-1])


def shard_sums(
    shard: Shard, scorer: Any, columns: Columns, on_batch: Callable[[int], None], rows: Sequence[int] | None = None
) -> list[float]:
    """log-probabilities of a shard's responses, or of some of its rows."""
    frame = read_parquet(shard.generations, [columns.prompt, columns.response])
    if rows is not None:
        frame = frame[list(rows)]
    prompts: list[Tokens] = list(token_arrays(frame, columns.prompt, shard.generations))
    responses: list[Tokens] = list(token_arrays(frame, columns.response, shard.generations))
    # A response of no tokens has nothing to sum; the miner drops it as too short.
    answered = [row for row, response in enumerate(responses) if len(response)]
    found = scorer.sums([prompts[row] for row in answered], [responses[row] for row in answered], on_batch)
    if len(answered) < len(responses):
        on_batch(len(responses) - len(answered))
    sums = np.zeros(len(responses))
    sums[answered] = found
    return sums.tolist()


def score_shards(
    items: ShardQueue,
    *,
    report: Report,
    config: ScoreConfig,
    models: ModelConfig,
    folder: Path,
    role: Role,
    shards: list[Shard],
    columns: Columns,
    beta: float,
) -> None:
    """The working half: one model over the shards that `items` deals.

    Under the reference a shard's half is written, under the policy its scores.
    """
    with timed("import"):
        from dice_py.scoring.scorer import Scorer

    scorer: Scorer | None = None
    while (number := items.receive(wait=True)) is not None:
        if scorer is None:
            scorer = Scorer(held_model(folder, models), config, report)
        shard = shards[number]
        logps = shard_sums(shard, scorer, columns, lambda count: report("advance", count=count))
        if role == "reference":
            write_parquet(shard.half, pl.DataFrame({"ref_logp": logps}, schema=REF_LOGPS), key=shard.key)
        else:
            write_scores(shard, pl.Series("logp", logps, dtype=pl.Float64), beta, report)
        report("throughput", stage="score", model=role, file=shard.out.name, **scorer.take_work())
        report("item", number=number)


REF_LOGPS = {"ref_logp": pl.Float64}


def write_scores(shard: Shard, logps: pl.Series, beta: float, report: Report) -> None:
    """Writes a shard's scores from its half and the policy's sums."""
    frame = read_parquet(shard.half, ["ref_logp"]).with_columns(logps.cast(pl.Float64).alias("logp"))
    # The difference is taken before rounding to f32: two sums of -1000 share most of their digits.
    frame = frame.with_columns(reward=beta * (pl.col("logp") - pl.col("ref_logp")))
    write_parquet(shard.out, frame, key=shard.key, schema=SCORES, meta={"beta": beta})
    shard.half.unlink()
    report("shard", file=shard.out.name, key=shard.key, rows=frame.height)
