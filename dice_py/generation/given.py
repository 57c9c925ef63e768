"""Reads responses that were sampled elsewhere, from the user's Parquet, JSONL or JSON files.

A row names its prompt by text, by messages, or by the `prompt_id` of one of the run's prompts, and has one response or
a list of them: as text (`response`), or as the token ids that were sampled (`token_ids`). Nothing is tokenized here:
stages/given_generations.py does that with the policy's tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.data import Message, prompt_key, prompts_frame
from dice_py.errors import DataError
from dice_py.events import Report, no_report
from dice_py.rows.bad_rows import BadRowRule, BadRows
from dice_py.rows.forms import Taken, prompt_column, prompt_of
from dice_py.rows.messages import read_messages
from dice_py.rows.row import Row
from dice_py.rows.sources import read_rows
from dice_py.rows.values import whole, written
from dice_py.storage.schemas import PLACE

_COLUMNS: dict[str, Any] = {
    "prompt_id": pl.UInt32,
    "response": pl.String,
    "token_ids": pl.List(pl.Int32),
    "prompt_token_ids": pl.List(pl.Int32),
    "sampled_logp": pl.Float64,
    "finish_reason": pl.String,
    PLACE: pl.String,
}
GIVEN = pl.Schema(_COLUMNS)
"""One row for each response; `response` or `token_ids` is null, and what its file does not say is null."""

_TEXT, _IDS = ("response", "responses"), ("token_ids", "response_token_ids")
_LOGPS, _REASONS = ("sampled_logp", "logp"), ("finish_reason", "finish_reasons")
_ENDED = {"stop", "eos", "eos_token", "end_turn", "stop_sequence", "stop_token"}
_CUT_OFF = {"length", "max_tokens", "max_new_tokens"}
_LARGEST_ID = 2**31 - 1


@dataclass(frozen=True)
class GivenReading:
    """How the user's files are read."""

    prompt_column: str = "prompt"
    rule: BadRowRule = field(default_factory=BadRowRule)
    ignored: Collection[str] = ()
    complete: Callable[[list[Message]], list[Message]] = list
    """Adds to a prompt what the run's settings say of all prompts."""
    report: Report = no_report
    taken: Taken = field(default_factory=lambda: Taken("the given responses"))


def read_given_prompts(files: Sequence[Path], reading: GivenReading) -> pl.DataFrame:
    """The prompts of the files, each once, in the order of the files.

    Returns:
        Columns `prompt_id` (u32, from 0), `messages` and `where`.

    Raises:
        DataError: a row has no prompt, or no file has one.
    """
    seen: dict[str, tuple[list[Message], str]] = {}
    bad = BadRows(reading.rule, _named(files), "responses")
    for row in _rows(files):
        with bad.row():
            column = _prompt_column(row, reading)
            if column is None:
                raise DataError(
                    f"{row.where}: no column {reading.prompt_column!r}; its columns are {', '.join(row.columns)}. "
                    "prompt_id alone names a prompt of data.prompts, which is not given: name that (--prompts FILE), "
                    "or the column of the prompt's text with --set data.prompt_column=NAME"
                )
            messages = _prompt(row, reading)
            seen.setdefault(prompt_key(messages), (messages, row.place))
    bad.finish()  # said of the responses, which are read after the prompts
    if not seen:
        raise DataError(f"{_named(files)}: no responses")
    places = pl.Series(PLACE, [place for _, place in seen.values()], dtype=pl.String)
    return prompts_frame([messages for messages, _ in seen.values()]).with_columns(places)


def read_given(
    files: Sequence[Path], prompts: pl.DataFrame, held_out: Collection[str], reading: GivenReading, *, next_id: int
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The responses of the files, and the prompts that they answer.

    Args:
        prompts: of the run, with `prompt_id` and `messages`. Prompts that are none of these get the ids from `next_id`.
        held_out: keys of the prompts (`prompt_key`) whose responses are left out; so are those of an unknown
            `prompt_id` below `next_id`, which is a held-out prompt's.

    Returns:
        Responses with the schema `GIVEN`, sorted by `prompt_id`, in the order of the files; and prompts with
        `prompt_id`, `messages` and `where`, sorted by `prompt_id`.

    Raises:
        DataError: a row cannot be used, naming file and row; or no response is left.
    """
    messages_of: dict[int, tuple[list[Message], str]] = {
        prompt_id: (messages, f"prompt {prompt_id}")
        for prompt_id, messages in prompts.select("prompt_id", "messages").iter_rows()
    }
    ids = {prompt_key(messages): prompt_id for prompt_id, (messages, _) in messages_of.items()}
    known = len(messages_of) and next_id
    found: list[tuple[Any, ...]] = []
    left_out = 0
    bad = BadRows(reading.rule, _named(files), "rows of responses")
    for row in _rows(files):
        with bad.row():
            column = _prompt_column(row, reading)
            responses = _responses(row)
            if column is None:
                prompt_id = _given_id(row, reading, known)
                if prompt_id not in messages_of:
                    left_out += len(responses)
                    continue
            else:
                messages = _prompt(row, reading)
                key = prompt_key(messages)
                if key in held_out:
                    left_out += len(responses)
                    continue
                prompt_id = ids.setdefault(key, next_id)
                if prompt_id == next_id:
                    messages_of[prompt_id] = (messages, row.place)
                    next_id += 1
            asked = _token_ids(written(row.columns.get("prompt_token_ids")), row.where, "prompt_token_ids")
            found += [(prompt_id, *response[:2], asked, *response[2:], row.where) for response in responses]
    bad.finish(reading.report)
    reading.taken.finish(reading.report)
    if left_out:
        reading.report("note", text=f"{left_out} of the given responses are to held-out prompts: left out")
    if not found:
        raise DataError(f"{_named(files)}: no response that can be used")
    given = pl.DataFrame(found, schema=GIVEN, orient="row").sort("prompt_id", maintain_order=True)
    answered = [(number, *messages_of[number]) for number in given["prompt_id"].unique().sort()]
    frame = prompts_frame([messages for _, messages, _ in answered]).with_columns(
        pl.Series("prompt_id", [number for number, *_ in answered], dtype=pl.UInt32),
        pl.Series(PLACE, [place for *_, place in answered], dtype=pl.String),
    )
    return given, frame


def _named(files: Sequence[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} further files"


def _rows(files: Sequence[Path]) -> Iterator[Row]:
    for file in files:
        yield from read_rows(file)


def _prompt_column(row: Row, reading: GivenReading) -> str | None:
    """The column that holds the prompt; None where `prompt_id` names it."""
    column = prompt_column(row.columns, reading.prompt_column, reading.taken)
    return column if row.columns.get(column) is not None else None


def _prompt(row: Row, reading: GivenReading) -> list[Message]:
    return reading.complete(prompt_of(row.columns, row.where, reading.prompt_column, reading.ignored, reading.taken))


def _given_id(row: Row, reading: GivenReading, known: int) -> int:
    value = whole(written(row.columns.get("prompt_id")))
    if value is None:
        raise DataError(
            f"{row.where}: no prompt: neither a column {reading.prompt_column!r} nor prompt_id; its columns are "
            f"{', '.join(row.columns)}. Name the prompt's with --set data.prompt_column=NAME"
        )
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < known:
        raise DataError(
            f"{row.where}: prompt_id is {value!r:.40}, which is no prompt of the run (these have the ids from 0 to "
            f"{known - 1}, in the order of data.prompts); correct it, or give the prompt itself"
        )
    return value


_Response = tuple[str | None, list[int] | None, float | None, str | None]


def _responses(row: Row) -> list[_Response]:
    """Text, token ids, log-probability and finish reason of each response of a row."""
    columns, where = row.columns, row.where
    by_ids = _first(columns, _IDS)
    by_text = next((name for name in _TEXT if columns.get(name) is not None), None)  # an empty text is a response
    name = by_ids or by_text
    if name is None:
        raise DataError(
            f"{where}: no response: neither 'response' (text) nor 'token_ids'; its columns are {', '.join(columns)}. "
            "Rename the column of the responses to one of these"
        )
    value = written(columns[name]) if by_ids else columns[name]
    is_list = _is_list_of_lists(value) if by_ids else isinstance(value, list) and not _is_turns(value)
    values = value if is_list else [value]
    if not values:
        raise DataError(f"{where}: {name!r} is an empty list; remove the row, or give its responses")
    logps, reasons = (_beside(columns, names, where, is_list, len(values), name) for names in (_LOGPS, _REASONS))
    return [
        (
            None if by_ids else _text(value, where, name),
            _token_ids(value, where, name) if by_ids else None,
            _logp(logp, where),
            _finish_reason(reason, where),
        )
        for value, logp, reason in zip(values, logps, reasons, strict=True)
    ]


def _first(columns: dict[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if written(columns.get(name)) is not None), None)


def _is_list_of_lists(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, list) for item in value)


def _is_turns(value: list[Any]) -> bool:
    return len(value) == 1 and isinstance(value[0], dict)


def _beside(
    columns: dict[str, Any], names: Sequence[str], where: str, is_list: bool, count: int, responses: str
) -> list[Any]:
    """What a row says of each of its responses: one value, or a list as long as that of the responses."""
    name = _first(columns, names)
    if name is None:
        return [None] * count
    value = written(columns[name])
    if not is_list:
        return [value]
    if not isinstance(value, list) or len(value) != count:
        raise DataError(f"{where}: {responses!r} has {count} responses, so {name!r} must be a list of {count} values")
    return value


def _text(value: Any, where: str, name: str) -> str:
    if isinstance(value, str):
        return value
    turns = read_messages(value, "assistant", where, name)
    if [turn["role"] for turn in turns] != ["assistant"] or turns[0].get("extra"):
        raise DataError(f"{where}: {name!r} must be text, or one assistant turn of text, got {value!r:.80}")
    return turns[0]["content"]


def _token_ids(value: Any, where: str, name: str) -> list[int] | None:
    if value is None:
        return None
    sound = isinstance(value, list) and all(isinstance(item, int) and not isinstance(item, bool) for item in value)
    if not sound or not all(0 <= item <= _LARGEST_ID for item in value):
        raise DataError(f"{where}: {name!r} must be a list of token ids (integers from 0), got {value!r:.80}")
    if not value:
        raise DataError(f"{where}: {name!r} is empty; a response has at least the token that ends it")
    return list(value)


def _logp(value: Any, where: str) -> float | None:
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value > 0:
        raise DataError(
            f"{where}: the log-probability of a response is the sum over its tokens, in nats, a number that is not "
            f"above 0; got {value!r:.40}. Leave it out to have it computed"
        )
    return float(value)


def _finish_reason(value: Any, where: str) -> str | None:
    """ "stop", "length", or None where the file does not say."""
    if value is None:
        return None
    if isinstance(value, str) and value in _ENDED | _CUT_OFF:
        return "stop" if value in _ENDED else "length"
    raise DataError(
        f"{where}: finish_reason is {value!r:.40}; write stop (the response ended) or length (it was cut off by the "
        "token limit)"
    )
