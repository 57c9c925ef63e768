"""Mined pairs joined with the token ids that were sampled, as rows of a training set."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from dice_py.errors import DataError
from dice_py.models.token_ids import check_token_ids
from dice_py.replay.same_responses import check_same_responses, named
from dice_py.storage.lookup import check_row_aligned, look_up
from dice_py.storage.parquet import parquet_meta, parquet_rows, present, read_parquet
from dice_py.storage.schemas import START_LOGPS, TRAINING_LABELS, fit


def gather_mined(
    mined: pl.DataFrame,
    generations: list[Path],
    scores: list[Path],
    prompts: pl.DataFrame,
    *,
    reference: bool = False,
) -> pl.DataFrame:
    """The mined pairs as rows of a training set (the columns of TRAINING_SET, source "mined"), in the order of `mined`.

    The labels of `mined` come with them (TRAINING_LABELS, those that are there).

    Token ids and log-probabilities are those of the generate and score stages; nothing is tokenized or scored again.
    The policy that scored the responses is the one that training starts from, so its `logp` is the log-probability
    of the reference in DPO (`ref_chosen_logps`, `ref_rejected_logps`; f32, nats). With `reference`, the model that the
    scores call reference is that of DPO: its `ref_logp` is taken, and the policy's are the columns START_LOGPS.

    Args:
        mined: `prompt_id`, `chosen_row` and `rejected_row`; the row numbers count through all shards.
        generations, scores: the shards, in order (schemas GENERATIONS and SCORES).
        prompts: `prompt_id` and `messages`.

    Raises:
        DataError: the files do not belong together: shards of other numbers of rows, a row or prompt that is not there,
            a row of another prompt; or a column or value that cannot be used.
    """
    return gather_from(mined, Shards.of(generations, scores), prompts, reference=reference)


@dataclass(frozen=True)
class Shards:
    """The shards of a round, or of a pool of rounds, which were checked to belong together."""

    generations: list[Path]
    scores: list[Path]
    ends: list[int]
    """For each shard the number of rows up to its end."""

    @staticmethod
    def of(generations: list[Path], scores: list[Path]) -> Shards:
        """Checks the shards.

        Raises:
            DataError: they do not belong together.
        """
        check_row_aligned(generations, scores)
        return Shards(generations, scores, list(itertools.accumulate(map(parquet_rows, generations))))


def gather_from(mined: pl.DataFrame, shards: Shards, prompts: pl.DataFrame, *, reference: bool = False) -> pl.DataFrame:
    """As `gather_mined`, for some of the mined pairs at a time: only shards that have rows of theirs are read."""
    check_mined(mined)
    generations, scores = shards.generations, shards.scores
    rows = _rows(mined, shards, ["logp", "ref_logp"] if reference else ["logp"])
    check_same_responses(mined, rows, generations, scores)
    answer = pl.concat_list(pl.struct(role=pl.lit("assistant"), content="response"))

    def side(name: str) -> pl.DataFrame:
        keys = mined.select(pl.col("prompt_id"), pl.col(f"{name}_row").cast(pl.UInt64).alias("row"))
        found = look_up(keys, rows, "row", who=f"the mined pairs' {name}_row", where=named(generations))
        other = (found["prompt_id"] != found["sampled_prompt_id"]).fill_null(True)
        if other.any():
            at = int(other.arg_max() or 0)
            raise DataError(
                f"row {at} of the mined pairs is of prompt {found['prompt_id'][at]}, but its {name}_row "
                f"{found['row'][at]} in {named(generations)} is of prompt {found['sampled_prompt_id'][at]}: give the "
                "generations that were mined, in the same order"
            )
        logps = [pl.col("logp").alias(f"ref_{name}_logps")]
        if reference:
            logps = [pl.col("logp").alias(f"start_{name}_logps"), pl.col("ref_logp").alias(f"ref_{name}_logps")]
        ids = pl.col("token_ids").alias(f"{name}_ids")
        return found.select(pl.col("prompt_token_ids").alias(f"{name}_prompt_ids"), ids, answer.alias(name), *logps)

    messages = look_up(
        mined.select("prompt_id"),
        prompts.select("prompt_id", prompt="messages"),
        "prompt_id",
        who="the mined pairs",
        where="the file of prompts",
    )
    both = pl.concat([messages.select("prompt"), side("chosen"), side("rejected")], how="horizontal")
    return both.select(
        "prompt", pl.col("chosen_prompt_ids").alias("prompt_ids"), "chosen_ids", "chosen", "ref_chosen_logps",
        "rejected_ids", "rejected", "ref_rejected_logps", *(START_LOGPS if reference else ()),
        source=pl.lit("mined"),
    ).hstack(labels_of(mined))  # fmt: skip


def labels_of(mined: pl.DataFrame) -> pl.DataFrame:
    """Those of TRAINING_LABELS that mined pairs have.

    Raises:
        DataError: a label is of another kind than mining writes.
    """
    schema = pl.Schema({name: dtype for name, dtype in TRAINING_LABELS.items() if name in mined.columns})
    try:
        return fit(mined, schema)
    except pl.exceptions.PolarsError as error:
        first = str(error).strip().splitlines()[0]
        raise DataError(
            f"the mined pairs have a label that is none of mining's ({first}); its labels are "
            f"{', '.join(f'{name} {dtype}' for name, dtype in schema.items())}: rename the column, or mine again"
        ) from None


def mined_alpha(mined: Path) -> float | None:
    """The penalty in reward per token that made the pairs of a file of the mine stage; None where there is none."""
    meta = parquet_meta(mined)
    return meta.get("alpha_per_token") if isinstance(meta, dict) else None


def have_equal_answers(pairs: pl.DataFrame) -> pl.Series:
    """Which rows of a training set have the same answer on both sides: the same tokens, or the same text.

    Two samples of one text get rewards that differ in their last digits, where they are scored in other batches.
    """
    alike = (pl.col("chosen_ids") == pl.col("rejected_ids")) | (pl.col("chosen") == pl.col("rejected"))
    return pairs.select(alike.fill_null(False)).to_series()


def check_mined(mined: pl.DataFrame, place: Path | str = "the mined pairs") -> None:
    """Checks that a frame is one of mined pairs.

    Raises:
        DataError: a column is missing, or is not of integers of zero or more.
    """
    for name in ("prompt_id", "chosen_row", "rejected_row"):
        if name not in mined.columns:
            raise DataError(
                f"{place}: no column '{name}'; its columns are {', '.join(mined.columns)}: give the file that dice "
                "mine wrote"
            )
        column = mined[name]
        if not column.dtype.is_integer():
            raise DataError(f"{place}: column '{name}' has dtype {column.dtype}, but must hold integers")
        bad = column.is_null() | (column < 0).fill_null(False)
        if bad.any():
            at = int(bad.arg_max() or 0)
            raise DataError(
                f"{place}: column '{name}' is {column[at]} in row {at}, but must be a number of zero or more"
            )
    equal = mined["chosen_row"].cast(pl.UInt64) == mined["rejected_row"].cast(pl.UInt64)
    if equal.any():
        at = int(equal.arg_max() or 0)
        raise DataError(f"{place}: row {at} names response {mined['chosen_row'][at]} as chosen and as rejected")


def _rows(mined: pl.DataFrame, shards: Shards, logps: list[str]) -> pl.DataFrame:
    """The rows of both kinds of shards that the pairs name, with their number in `row`."""
    needed = pl.concat([mined[side].cast(pl.UInt64) for side in ("chosen_row", "rejected_row")]).unique().sort()
    ends = shards.ends
    cuts = [
        0,
        *needed.search_sorted(pl.Series(ends, dtype=pl.UInt64), side="left").to_list(),
    ]  # a round may have tens of thousands of shards
    parts, first = [], 0
    for number, (sampled, scored) in enumerate(zip(shards.generations, shards.scores, strict=True)):
        here = needed[cuts[number] : cuts[number + 1]] - first
        if len(here):
            part = read_parquet(sampled, [*_SAMPLED, *present(sampled, "response_tokens", "response_chars")])[here]
            values = read_parquet(scored, [*logps, *present(scored, "reward")])[here]
            part = part.hstack(values).with_columns(row=here + first)
            _check_values(part, sampled)
            for name in logps:
                _check_logps(part[name], scored, here)
            parts.append(part.rename({"prompt_id": "sampled_prompt_id"}))
        first = ends[number]
    if not parts:
        return pl.DataFrame(schema={"row": pl.UInt64})
    return pl.concat(parts, how="diagonal_relaxed")


_ROUNDING = 0.01
"""Nats by which the sum of a response's log-probabilities may be above zero in half precision."""
_SAMPLED = ["prompt_id", "prompt_token_ids", "token_ids", "response"]


def _check_values(part: pl.DataFrame, sampled: Path) -> None:
    """Refuses responses that cannot be trained on, with their file and row."""
    for column in ("prompt_token_ids", "token_ids"):
        check_token_ids(part, column, sampled)
    if part["response"].dtype != pl.String or part["response"].null_count():
        raise DataError(f"{sampled}: column 'response' must hold text, but is {part['response'].dtype} or has nulls")


def _check_logps(logps: pl.Series, scored: Path, numbers: pl.Series) -> None:
    """Refuses what is no sum of log-probabilities, with its file and row."""
    name = logps.name
    if not logps.dtype.is_numeric():
        raise DataError(
            f"{scored}: column {name!r} has dtype {logps.dtype}, but must hold numbers: score these generations"
        )
    bad = ~logps.cast(pl.Float64).is_finite().fill_null(False)
    if bad.any():
        at = int(bad.arg_max() or 0)
        raise DataError(f"{scored}: column {name!r} is {logps[at]} in row {numbers[at]}, but must be a finite number")
    above = logps.cast(pl.Float64) > _ROUNDING
    if above.any():
        at = int(above.arg_max() or 0)
        raise DataError(
            f"{scored}: column {name!r} is {logps[at]} in row {numbers[at]}, but the logarithm of a probability is "
            "never above zero (are they losses, of the other sign?): score these generations"
        )
