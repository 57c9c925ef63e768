"""Two sets of responses to the same prompts, from a user's files or from `dice generate`, matched by prompt.

A set is a file with a prompt and a response in each row (AlpacaEval's model_outputs.json too), a shard of generations
beside its prompts.parquet, or the folder of both.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.config.prompt_settings import PromptSettings
from dice_py.data import read_responses
from dice_py.errors import DataError, UsageError
from dice_py.rows.messages import prompt_key
from dice_py.storage.lookup import look_up
from dice_py.storage.parquet import UNREADABLE, read_parquet
from dice_py.storage.schemas import GENERATIONS, PLACE, PROMPTS

_SHARDS = "generations-*.parquet"
_PROMPTS = "prompts.parquet"


@dataclass(frozen=True)
class ResponseSet:
    """Responses of one model."""

    name: str
    """The model's, in annotations and errors."""
    rows: pl.DataFrame
    """`messages`, `key` (equal for equal prompts only), `response`, `dataset` (text or null), `where`."""


@dataclass(frozen=True)
class Matched:
    """The n-th response of ours to a prompt beside the n-th of theirs, as far as both have one."""

    prompts: pl.DataFrame
    """`prompt_id` (u32), `messages`, `dataset` (text or null): the prompts of both."""
    ours: pl.DataFrame
    """`prompt_id`, `response`, `where` (the response's place in the user's files)."""
    theirs: pl.DataFrame
    """Likewise, row by row beside `ours`."""
    counts: dict[str, int]
    """`only_ours` and `only_theirs`: responses that have no counterpart."""


def read_response_set(
    path: Path, option: str, name: str | None, *, settings: PromptSettings | None = None, **reading: Any
) -> ResponseSet:
    """Reads the responses of one model.

    Args:
        path: a file, a shard, or a folder of shards.
        option: how errors name it.
        name: the model's; None: the one `generator` of the file, else the name of the file or folder.
        settings: what is said of every prompt. The prompts of shards have theirs already.
        reading: keywords of `read_responses`.

    Raises:
        DataError: there are no responses, or they cannot be read; or the file has several generators.
    """
    if path.is_dir():
        shards = sorted(path.glob(_SHARDS))
        if not shards:
            raise DataError(
                f"{option}: {path} has no {_SHARDS}; give a folder that `dice generate` wrote, or a file of responses"
            )
        return ResponseSet(name or path.resolve().name, _of_shards(shards, option))
    if _is_shard(path, reading.get("prompt_column", "prompt")):
        return ResponseSet(name or path.stem, _of_shards([path], option))
    rows = read_responses(path, **reading)
    if settings:
        rows = settings.of_rows(rows, "messages")
        keys = [prompt_key(messages) for messages in rows["messages"].to_list()]
        rows = rows.with_columns(pl.Series("key", keys, dtype=pl.String))
    generators = rows["generator"].drop_nulls().unique().sort().to_list()
    if len(generators) > 1:
        raise DataError(
            f"{option}: {path} has responses of {len(generators)} generators ({', '.join(generators[:3])}, …); give "
            "those of one model"
        )
    return ResponseSet(name or (generators or [path.stem])[0], rows.drop("generator"))


def _is_shard(path: Path, prompt_column: str) -> bool:
    if path.suffix.lower() != ".parquet" or not path.is_file():
        return False
    try:
        columns = pl.read_parquet_schema(path).keys()
    except UNREADABLE:
        return False  # the reader of rows will tell
    return prompt_column not in columns and {"prompt_id", "response"} <= columns


def _of_shards(shards: list[Path], option: str) -> pl.DataFrame:
    """The responses of shards, with the messages of the prompts.parquet beside them."""
    file = shards[0].parent / _PROMPTS
    if not file.is_file():
        raise DataError(
            f"{option}: {shards[0]} has no prompts, only their prompt_id, and there is no {file}: `dice generate` "
            "writes both; keep them in one folder"
        )
    try:
        prompts = read_parquet(file).select(pl.col("prompt_id").cast(PROMPTS["prompt_id"]), "messages")
        of_shards = [
            read_parquet(shard).select(
                pl.col("prompt_id").cast(GENERATIONS["prompt_id"]), pl.col("response").cast(pl.String)
            )
            for shard in shards
        ]
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{option}: {shards[0].parent} is not as `dice generate` writes it: {error}") from None
    rows = pl.concat(of_shards)
    if rows["response"].null_count():
        raise DataError(f"{option}: {shards[0].parent} has responses that are null, and cannot be judged")
    who = f"{option}: the responses in {shards[0].parent}"
    rows = look_up(rows, prompts, "prompt_id", who=who, where=str(shards[0].parent / _PROMPTS))
    keys = pl.Series("key", [prompt_key(messages) for messages in rows["messages"].to_list()], dtype=pl.String)
    places = pl.format("{}, prompt_id {}", pl.lit(str(shards[0].parent)), "prompt_id").alias(PLACE)
    return rows.select("messages", keys, "response", pl.lit(None, dtype=pl.String).alias("dataset"), places)


def match(ours: ResponseSet, theirs: ResponseSet) -> Matched:
    """Pairs the responses to equal prompts (all turns, roles and tools count), in the order of ours.

    Raises:
        DataError: no prompt is in both.
        UsageError: both have the same name.
    """
    if ours.name == theirs.name:
        raise UsageError(f"both sets of responses are named {ours.name!r}: give --ours-name and --theirs-name")
    place = pl.int_range(pl.len()).over("key").alias("place")
    one, other = (side.rows.with_columns(place) for side in (ours, theirs))
    both = one.join(other, on=["key", "place"], suffix=" of theirs", maintain_order="left")
    if both.is_empty():
        first = [side["messages"][0].to_list()[-1]["content"] for side in (one, other)]
        raise DataError(
            f"{ours.name} and {theirs.name} have no prompt in common; the first ones are {first[0]!r:.80} and "
            f"{first[1]!r:.80}"
        )
    prompts = both.unique("key", keep="first", maintain_order=True).with_row_index("prompt_id")
    rows = both.join(prompts.select("key", "prompt_id"), on="key", maintain_order="left")
    of_theirs = {name: f"{name} of theirs" for name in ("response", PLACE)}
    counts = {"only_ours": one.height - both.height, "only_theirs": other.height - both.height}
    return Matched(
        prompts.select("prompt_id", "messages", "dataset"),
        rows.select("prompt_id", "response", PLACE),
        rows.select("prompt_id", *(pl.col(column).alias(name) for name, column in of_theirs.items())),
        counts,
    )


def prompt_text(messages: list[Any]) -> str:
    """A prompt as the one text that AlpacaEval's files have: the question alone, or all turns with their roles."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
