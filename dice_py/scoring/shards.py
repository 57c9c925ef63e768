"""The work of one group of devices in the score stage: one model over shards of generations.

The reference is scored first. Its sums for a shard are kept in a file until the policy's are computed, so an
interrupted stage repeats neither pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import polars as pl

from dice_py.compute.shard_queue import ShardQueue
from dice_py.config.shared import ModelConfig
from dice_py.config.stages import ScoreConfig
from dice_py.events import Report
from dice_py.models.limits import check_positions, model_positions
from dice_py.models.loading import held_model
from dice_py.models.token_ids import check_token_ids
from dice_py.storage.parquet import parquet_key, read_parquet, write_parquet
from dice_py.storage.schemas import SCORES, SCORES_WITH_PREVIOUS
from dice_py.timing import timed

if TYPE_CHECKING:
    import numpy as np

    from dice_py.models.packing import Tokens

Role = Literal["reference", "previous", "policy"]
PreviousRole = Literal["policy", "reference"]
"""What a third model was in the reward of the round before; the stage's reference was the other."""
PreviousModel = tuple[Path, PreviousRole]
"""That model's folder, and its role."""

_REF_LOGPS = {"ref_logp": pl.Float64}
_PREVIOUS_LOGPS = {"previous_logp": pl.Float64}


@dataclass(frozen=True)
class Shard:
    """One file of generations, and the files that its scores are written to."""

    generations: Path
    out: Path
    ref_logps_file: Path
    """The reference's sums; deleted when the scores are written."""
    key: str
    sampled: bool
    """True when the policy sampled these generations."""

    @property
    def previous_logps_file(self) -> Path:
        """The sums of the third model, where there is one; deleted too."""
        return self.ref_logps_file.with_name(self.ref_logps_file.name.replace("ref-", "previous-"))


@dataclass(frozen=True)
class Columns:
    """Names of the columns of token ids."""

    prompt: str = "prompt_token_ids"
    response: str = "token_ids"


@dataclass(frozen=True)
class ScoreShards:
    """The work of one group: one model over the shards that it receives.

    For the reference it writes the file of the sums, as for a third model, and for the policy the scores.
    """

    config: ScoreConfig
    models: ModelConfig
    folder: Path
    """The model's folder."""
    role: Role
    shards: list[Shard]
    columns: Columns
    beta: float
    gate: dict[str, Any] | None = None
    """`key` and `figures` of the gate (scoring/gate.py), which the scores keep in their footer."""
    previous_role: PreviousRole | None = None
    """Of the third model, if there is one."""

    def __call__(self, shards: ShardQueue, *, report: Report) -> None:
        """Scores shards until `shards` has no more."""
        with timed("import"):
            from dice_py.scoring.scorer import Scorer

        scorer: Scorer | None = None
        while (number := shards.receive(wait=True)) is not None:
            if scorer is None:
                scorer = Scorer(held_model(self.folder, self.models), self.config, report)
            shard = self.shards[number]
            logps = shard_logps(shard, scorer, self.columns, lambda count: report("advance", count=count))
            if self.role == "reference":
                frame = pl.DataFrame({"ref_logp": logps}, schema=_REF_LOGPS)
                write_parquet(shard.ref_logps_file, frame, key=shard.key)
            elif self.role == "previous":
                frame = pl.DataFrame({"previous_logp": logps}, schema=_PREVIOUS_LOGPS)
                write_parquet(shard.previous_logps_file, frame, key=shard.key)
            else:
                sums = pl.Series("logp", logps, dtype=pl.Float64)
                write_scores(shard, sums, self.beta, self.gate, report, self.previous_role)
            report("throughput", stage="score", model=self.role, file=shard.out.name, **scorer.take_work())
            report("shard_complete", number=number)


def check_lengths(file: Path, columns: Columns, model: Path, models: ModelConfig) -> None:
    """Checks that each prompt with its response fits into a model's positions; from lengths alone, before any pass.

    Raises:
        DataError: with the file and the row.
    """
    limit = model_positions(model, models)
    if limit is None:
        return
    frame = read_parquet(file, [columns.prompt, columns.response])
    if not all(isinstance(dtype, pl.List) for dtype in frame.dtypes):
        return  # `token_arrays` says what is wrong with it
    lengths = frame.select(pl.col(columns.prompt).list.len() + pl.col(columns.response).list.len()).to_series()
    check_positions(
        lengths.fill_null(0).to_list(), limit, where=str(file), model=str(model), remedy="leave longer ones out"
    )


def shard_logps(
    shard: Shard, scorer: Any, columns: Columns, on_batch: Callable[[int], None], rows: Sequence[int] | None = None
) -> list[float]:
    """Σ_t log π(y_t | x, y_<t) in nats of a shard's responses, or of some of its rows; 0 for an empty response."""
    import numpy as np

    frame = read_parquet(shard.generations, [columns.prompt, columns.response])
    if rows is not None:
        frame = frame[list(rows)]
    vocabulary = scorer.shape.vocabulary
    prompts: list[Tokens] = list(token_arrays(frame, columns.prompt, shard.generations, vocabulary))
    responses: list[Tokens] = list(token_arrays(frame, columns.response, shard.generations, vocabulary))
    # An empty response has nothing to sum; mining drops it as too short.
    answered = [row for row, response in enumerate(responses) if len(response)]
    sums = np.zeros(len(responses))
    sums[answered] = scorer.sums([prompts[row] for row in answered], [responses[row] for row in answered], on_batch)
    if len(answered) < len(responses):
        on_batch(len(responses) - len(answered))
    return sums.tolist()


def write_scores(
    shard: Shard,
    logps: pl.Series,
    beta: float,
    gate: dict[str, Any] | None,
    report: Report,
    previous_role: PreviousRole | None = None,
) -> None:
    """Writes a shard's scores from the sums of the reference, the policy (`logps`, f64), and a third model if any.

    A shard that the policy sampled keeps the figures of the gate, so that they are known as long as one of them is.
    """
    frame = read_parquet(shard.ref_logps_file, ["ref_logp"]).with_columns(logps.cast(pl.Float64).alias("logp"))
    # The difference is taken before rounding to f32: two sums of -1000 share most of their digits.
    frame = frame.with_columns(reward=beta * (pl.col("logp") - pl.col("ref_logp")))
    schema = SCORES
    if previous_role is not None:
        frame = frame.hstack(read_parquet(shard.previous_logps_file, ["previous_logp"]))
        difference = pl.col("previous_logp") - pl.col("ref_logp")
        sign = 1.0 if previous_role == "policy" else -1.0
        frame = frame.with_columns(previous_reward=sign * beta * difference)
        schema = SCORES_WITH_PREVIOUS
    # Whoever looks up rows in both files can tell by the key that they belong together.
    meta: dict[str, Any] = {"beta": beta, "generations_key": parquet_key(shard.generations)}
    if shard.sampled and gate is not None:
        meta["gate"] = gate
    write_parquet(shard.out, frame, key=shard.key, schema=schema, meta=meta)
    shard.ref_logps_file.unlink()
    shard.previous_logps_file.unlink(missing_ok=True)
    report("shard", file=shard.out.name, key=shard.key, rows=frame.height)


def token_arrays(
    frame: pl.DataFrame, column: str, place: Path | str, vocabulary: int | None = None
) -> list[np.ndarray]:
    """A column of lists of token ids as int64 arrays, which share their memory.

    Args:
        place: names the frame in an error.
        vocabulary: number of ids that the model knows; None: not checked.

    Raises:
        DataError: as `check_token_ids`.
    """
    # Here, since the registry of stages is imported where only mining is installed, without NumPy.
    import numpy as np

    check_token_ids(frame, column, place, vocabulary)
    series = frame[column]
    values = series.explode(empty_as_null=False).cast(pl.Int64).to_numpy()
    if not len(series):
        return []
    return np.split(values, series.list.len().to_numpy().cumsum()[:-1])
