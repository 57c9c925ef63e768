"""The pairs of a round that people read, with what decided them, as rows of INSPECTED_PAIRS (storage/schemas.py).

Of the files only the rows of these pairs, and of their prompts' candidates, are kept in memory; of all others the
numbers that mining reads, and the lengths.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.mining.pair_sample import draw_pairs
from dice_py.replay.mined import check_mined, gather_mined
from dice_py.storage.lookup import look_up
from dice_py.storage.parquet import read_parquet
from dice_py.storage.schemas import (
    CANDIDATE,
    INSPECTED_PAIRS,
    MESSAGES_WITH_EXTRA,
    MINED_LABELS,
    PLACE,
    TRAINING_LABELS,
)

_ROW = "\0row"
_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
SIDES = ("chosen", "rejected")
WITH_IDS = pl.Schema(INSPECTED_PAIRS | dict.fromkeys(_IDS, pl.List(pl.Int32)))
"""INSPECTED_PAIRS with the token ids that the credits are of."""


def draw_round(
    mined: pl.DataFrame, generations: Sequence[Path], training_set: Path, count: int, seed: int
) -> tuple[list[int], list[int]]:
    """A stratified sample (mining/pair_sample.py) of a round's pairs.

    Mined pairs are drawn from all that were mined, also where replay.total leaves some of them out of the training.

    Args:
        mined: the mined pairs.
        generations: the shards that their row numbers count through.
        training_set: with the replayed pairs, whose `source` is not "mined".

    Returns:
        The rows of `mined`, and those of the training set, both ascending.
    """
    lengths = pl.scan_parquet(list(generations), glob=False).select("response_tokens").collect()["response_tokens"]
    of_mined = mined.select(
        pl.lit("mined").alias("source"),
        *(lengths.gather(mined[f"{side}_row"]).alias(f"{side}_tokens") for side in SIDES),
    )
    replayed = (
        pl.scan_parquet(training_set, glob=False)
        .select("source", *(pl.col(f"{side}_ids").list.len().alias(f"{side}_tokens") for side in SIDES))
        .with_row_index(_ROW)
        .filter(pl.col("source") != "mined")
        .collect(engine="streaming")  # the token ids of all pairs are never in memory
        .sort(_ROW)
    )
    pairs = pl.concat([of_mined, replayed.drop(_ROW)], how="vertical_relaxed")
    drawn = draw_pairs(pairs, count, seed)
    return (
        [row for row in drawn if row < mined.height],
        [int(replayed[_ROW][row - mined.height]) for row in drawn if row >= mined.height],
    )


def mined_pairs(
    mined: pl.DataFrame,
    rows: list[int],
    *,
    generations: list[Path],
    scores: list[Path],
    prompts: Path,
    rewards: pl.Series,
    ranking: pl.Series,
    round_number: int,
) -> pl.DataFrame:
    """Some of the mined pairs, as `WITH_IDS`, without credits.

    Args:
        mined: all mined pairs.
        rows: those to take.
        rewards, ranking: of all responses that were mined: the reward, and the score that mining ranked by.
    """
    check_mined(mined)
    pairs = mined[rows].with_columns(pl.Series(_ROW, rows, dtype=pl.UInt32))
    if pairs.is_empty():
        return pl.DataFrame(schema=WITH_IDS)
    asked = read_parquet(prompts, ["prompt_id", "messages"])
    asked = asked.filter(pl.col("prompt_id").is_in(pairs["prompt_id"].unique().implode()))
    texts = gather_mined(pairs, generations, scores, asked).select("prompt", "chosen", "rejected", *_IDS)
    responses = _responses(pairs, generations, rewards, ranking)
    sides = [_of_side(pairs, side, responses) for side in SIDES]
    labels = [name for name in MINED_LABELS if name in pairs.columns]
    frame = pl.concat([pairs, texts, *sides], how="horizontal").with_columns(
        pair_id=pl.format(f"r{round_number:02d}-mined-{{}}", pl.col(_ROW)),
        source=pl.lit("mined"),
        labels=_labels(pairs, labels),
        candidates=_candidates(pairs, responses),
    )
    return _complete(frame, round_number)


def _of_side(pairs: pl.DataFrame, side: str, responses: pl.DataFrame) -> pl.DataFrame:
    """What is known of the chosen or the rejected response of each pair beside its text."""
    names = ("penalized_reward", "finish_reason")
    table = responses.select(_ROW, *(pl.col(name).alias(f"{side}_{name}") for name in names))
    keys = pairs.select(pl.col(f"{side}_row").cast(pl.UInt64).alias(_ROW))
    return look_up(keys, table, _ROW, who="the pairs", where="the responses to their prompts").drop(_ROW)


def _responses(pairs: pl.DataFrame, generations: list[Path], rewards: pl.Series, ranking: pl.Series) -> pl.DataFrame:
    """All responses to the prompts of `pairs`, with the fields of CANDIDATE but `role`, `prompt_id` and their row."""
    wanted = pairs["prompt_id"].unique().implode()
    responses = (
        pl.scan_parquet(generations, glob=False)
        .select("prompt_id", "sample_id", "response", "response_tokens", "finish_reason")
        .with_row_index(_ROW)
        .filter(pl.col("prompt_id").is_in(wanted))
        .collect(engine="streaming")
        .with_columns(pl.col(_ROW).cast(pl.UInt64))
        .sort(_ROW)
    )
    at = responses[_ROW]
    return responses.with_columns(reward=rewards.gather(at), penalized_reward=ranking.gather(at))


def _candidates(pairs: pl.DataFrame, responses: pl.DataFrame) -> pl.Series:
    """For each pair the responses to its prompt, best first as mining ranks them, with the roles of its two."""
    numbered = pairs.select("prompt_id", "chosen_row", "rejected_row").with_row_index("\0pair")
    role = (
        pl.when(pl.col(_ROW) == pl.col("chosen_row"))
        .then(pl.lit("chosen"))
        .when(pl.col(_ROW) == pl.col("rejected_row"))
        .then(pl.lit("rejected"))
    )
    order = ["\0pair", "penalized_reward", "response_tokens", "reward", _ROW]
    ranked = numbered.join(responses, on="prompt_id", how="inner").with_columns(role=role)
    # NaN is greater than all numbers in Polars; here it ranks as what is not ranked.
    ranked = ranked.with_columns(pl.col("penalized_reward", "reward").fill_nan(None)).sort(
        order, descending=[False, True, False, True, False], nulls_last=True
    )
    return ranked.group_by("\0pair", maintain_order=True).agg(
        pl.struct(field.name for field in CANDIDATE.fields).cast(CANDIDATE).alias("candidates")
    )["candidates"]


def replayed_pairs(training_set: Path, rows: list[int], round_number: int) -> pl.DataFrame:
    """Some rows of a training set, as `WITH_IDS`: what is known of pairs that were not mined in this round."""
    names = pl.scan_parquet(training_set, glob=False).collect_schema().names()
    labels = [name for name in TRAINING_LABELS if name in names and name != "margin"]
    further = [*labels, *(["margin"] if "margin" in names else [])]
    frame = (
        pl.scan_parquet(training_set, glob=False)
        .select("prompt", "chosen", "rejected", *_IDS, "source", *further)
        .with_row_index(_ROW)
        .filter(pl.col(_ROW).is_in(pl.Series(rows, dtype=pl.UInt32).implode()))
        .collect(engine="streaming")
        .sort(_ROW)
    )
    frame = frame.with_columns(
        pair_id=pl.format(f"r{round_number:02d}-replay-{{}}", pl.col(_ROW)),
        labels=_labels(frame, labels),
    )
    return _complete(frame, round_number)


def file_pairs(pairs: pl.DataFrame) -> pl.DataFrame:
    """Pairs of a user's file, as `WITH_IDS`.

    Args:
        pairs: `prompt`, `chosen`, `rejected` (messages), `row`, and maybe `source`, `where`, and the token ids.
    """
    source = pl.col("source") if "source" in pairs.columns else pl.lit("file")
    labels = _labels(pairs, [name for name in (PLACE,) if name in pairs.columns])
    frame = pairs.with_columns(source=source, labels=labels, pair_id=pl.format("file-{}", pl.col("row")))
    return _complete(frame, None)


def _complete(frame: pl.DataFrame, round_number: int | None) -> pl.DataFrame:
    """A frame with all columns of `WITH_IDS`; what it lacks is null, and lists are empty."""
    lengths = [
        pl.col(f"{side}_ids").list.len().alias(f"{side}_tokens") for side in SIDES if f"{side}_ids" in frame.columns
    ]
    frame = frame.with_columns(*lengths, round=pl.lit(round_number, dtype=pl.UInt32))
    missing = {name: dtype for name, dtype in WITH_IDS.items() if name not in frame.columns}
    empty = pl.lit([], dtype=pl.List(CANDIDATE))
    frame = frame.with_columns(
        (empty if name == "candidates" else pl.lit(None, dtype=dtype)).alias(name) for name, dtype in missing.items()
    )
    return fitted(frame, WITH_IDS)


def fitted(frame: pl.DataFrame, schema: pl.Schema = INSPECTED_PAIRS) -> pl.DataFrame:
    """The columns of a schema. What a turn says beside its text (the field `extra`: tools, calls) follows the text."""
    turns = {name: frame.schema[name] for name in ("prompt", *SIDES)}
    role, content, extra = (pl.element().struct.field(name) for name in ("role", "content", "extra"))
    complete = pl.concat_str(content, extra, separator="\n", ignore_nulls=True).alias("content")
    texts = [
        pl.col(name).list.eval(pl.struct(role, complete))
        for name, dtype in turns.items()
        if dtype == MESSAGES_WITH_EXTRA
    ]
    return frame.with_columns(texts).select(schema.names()).cast(dict(schema.items()))


def _labels(pairs: pl.DataFrame, names: list[str]) -> pl.Series:
    """The labels of each pair as a JSON object; null where it has none."""

    def text(values: tuple[Any, ...]) -> str | None:
        known = {
            name: value
            for name, value in zip(names, values, strict=True)
            if value is not None and not (isinstance(value, float) and not math.isfinite(value))
        }
        return json.dumps(known, ensure_ascii=False) if known else None

    columns = [pairs[name].to_list() for name in names]
    rows = zip(*columns, strict=True) if columns else [()] * pairs.height
    return pl.Series("labels", [text(row) for row in rows], dtype=pl.String)
