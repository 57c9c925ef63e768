"""Reads a user's prompts and offline pairs from JSONL, JSON or Parquet files in TRL's formats.

TRL's formats: `prompt` as text or as a list of messages; `chosen` and `rejected` likewise; or, without a prompt column,
`chosen` and `rejected` as full conversations whose common beginning is the prompt. The results are messages;
models/tokenization.py turns them into token ids.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import polars as pl

from dice_py.errors import DataError
from dice_py.storage.schemas import MESSAGES, PROMPTS


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


class Pair(TypedDict):
    """One offline preference pair as messages; `chosen` and `rejected` hold the responses without the prompt."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (where, row) for each row; `where` names the file and the line or row, for error messages.

    Raises:
        DataError: the file is absent, empty, of an unknown type, or has a line that is not a JSON object.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist (or is not a file)")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet_rows(path)
    elif suffix in (".jsonl", ".ndjson"):
        yield from _jsonl_rows(path)
    elif suffix == ".json":
        yield from _json_rows(path)
    else:
        raise DataError(f"{path}: unknown file type {suffix!r}; use .jsonl, .json or .parquet")


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        frame = pl.read_parquet(path, glob=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {str(error).strip()}") from None
    for index, row in enumerate(frame.iter_rows(named=True)):
        yield f"{path}, row {index}", row


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            line = line.strip()
            if line:
                where = f"{path}, line {number}"
                yield where, _object(_parse(line, where), where)


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    loaded = _parse(path.read_bytes(), str(path))
    if not isinstance(loaded, list):
        raise DataError(f"{path}: a .json file must hold one list of objects; one object per line is .jsonl")
    for index, item in enumerate(loaded):
        where = f"{path}, item {index}"
        yield where, _object(item, where)


def _parse(data: bytes, where: str) -> Any:
    try:
        text = data.decode("utf-8-sig")  # "sig": some editors write a byte order mark
        value = json.loads(text)
        # A lone surrogate is valid JSON, but not valid Unicode, so it could not be stored.
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start}); convert it") from None
    except UnicodeEncodeError:
        raise DataError(f"{where}: holds half of a surrogate pair, which is not valid text; fix or remove it") from None
    except json.JSONDecodeError as error:
        at = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise DataError(f"{where}: not valid JSON ({error.msg} at {at}); fix or remove it") from None
    except RecursionError:
        raise DataError(f"{where}: JSON nested too deeply; fix or remove it") from None
    return value


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, not a {type(value).__name__}")
    return value


def _messages(value: Any, role: str, where: str, column: str) -> list[Message]:
    """Turns text into one message of `role`; checks messages, and drops their fields but role and content."""
    if isinstance(value, str):
        if not value:
            raise DataError(f"{where}: {column!r} is an empty text")
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: {column!r} must be text or a non-empty list of messages, got {value!r:.80}")
    messages: list[Message] = []
    for item in value:
        if (
            not isinstance(item, dict)
            or not isinstance(item.get("role"), str)
            or not isinstance(item.get("content"), str)
        ):
            raise DataError(f"{where}: {column!r} holds {item!r:.80}, not a message with role and content as text")
        messages.append({"role": item["role"], "content": item["content"]})
    return messages


def _column(row: dict[str, Any], column: str, where: str, option: str, key: str | None = None) -> Any:
    if column not in row:
        raise DataError(
            f"{where}: no column {column!r}; its columns are {', '.join(row)}. Name the right one with "
            + (f"--{option}-column (in a run: --set data.{option}_column=NAME)" if key is None else f"--set {key}=NAME")
        )
    return row[column]


def _prompt(value: Any, where: str, column: str) -> list[Message]:
    messages = _messages(value, "user", where, column)
    if not any(message["role"] == "user" for message in messages):
        raise DataError(f"{where}: the prompt has no user turn; its roles are {[m['role'] for m in messages]}")
    if messages[-1]["role"] == "assistant":
        raise DataError(f"{where}: the prompt ends with an assistant turn; it must end where the response begins")
    return messages


def read_prompts(path: Path, column: str = "prompt") -> pl.DataFrame:
    """Reads prompts: columns `prompt_id` (u32, in file order) and `messages`. Equal prompts are kept once.

    A file of offline pairs works too: without a prompt column, the common beginning of `chosen` and `rejected` is the
    prompt.

    Raises:
        DataError: the message names the file, the line and the column.
    """
    seen: dict[str, list[Message]] = {}
    for where, row in read_rows(path):
        if column not in row and "messages" in row and column == "prompt":
            messages = _prompt(row["messages"], where, "messages")
        elif column not in row and {"chosen", "rejected"} <= row.keys():
            messages = _pair(row, where, column, "chosen", "rejected")["prompt"]
        else:
            messages = _prompt(_column(row, column, where, "prompt"), where, column)
        seen.setdefault(prompt_key(messages), messages)
    if not seen:
        raise DataError(f"{path} holds no prompts")
    return prompts_frame(seen.values())


def prompts_frame(prompts: Iterable[list[Message]]) -> pl.DataFrame:
    """The prompts artifact: `prompt_id` counts from 0 in the order of `prompts`."""
    rows = list(prompts)
    return pl.DataFrame({"prompt_id": range(len(rows)), "messages": rows}, schema=PROMPTS)


def prompt_key(messages: list[Message]) -> str:
    """A text that is equal for equal prompts only."""
    return json.dumps([[m["role"], m["content"]] for m in messages], ensure_ascii=False)


def _pair(row: dict[str, Any], where: str, prompt: str, chosen: str, rejected: str) -> Pair:
    answers = {
        "chosen": _messages(_column(row, chosen, where, "chosen"), "assistant", where, chosen),
        "rejected": _messages(_column(row, rejected, where, "rejected"), "assistant", where, rejected),
    }
    if prompt in row and row[prompt] is not None:
        messages = _prompt(row[prompt], where, prompt)
        # Some published datasets have a prompt column, and full conversations as chosen and rejected.
        for name, answer in answers.items():
            if answer[: len(messages)] == messages:
                answers[name] = answer[len(messages) :]
    else:
        shared = 0
        # The last turns are the responses, even if they are equal.
        for left, right in zip(answers["chosen"][:-1], answers["rejected"][:-1], strict=False):
            if left != right:
                break
            shared += 1
        if shared == 0:
            raise DataError(
                f"{where}: no column {prompt!r}, and {chosen!r} and {rejected!r} have no common beginning; "
                f"its columns are {', '.join(row)}. Name the prompt's with --prompt-column (in a run: "
                "--set data.prompt_column=NAME)"
            )
        messages = _prompt(answers["chosen"][:shared], where, chosen)
        answers = {name: answer[shared:] for name, answer in answers.items()}
    for name, answer in answers.items():
        if [message["role"] for message in answer] != ["assistant"]:
            raise DataError(
                f"{where}: {name!r} must be one assistant turn after the prompt, got roles "
                f"{[message['role'] for message in answer]}"
            )
    return {"prompt": messages, "chosen": answers["chosen"], "rejected": answers["rejected"]}


def read_pairs(
    path: Path,
    *,
    prompt_column: str = "prompt",
    chosen_column: str = "chosen",
    rejected_column: str = "rejected",
    weight_column: str | None = None,
    margin_column: str | None = None,
    round_column: str | None = None,
    source_column: str | None = None,
    current_round: int | None = None,
    weight_key: str | None = None,
) -> pl.DataFrame:
    """Reads offline pairs. Pairs whose chosen and rejected responses are equal are left out.

    Args:
        path: a file in one of TRL's formats.
        prompt_column: column of the prompt.
        chosen_column: column of the preferred response.
        rejected_column: column of the other response.
        weight_column: column of sampling weights, finite numbers ≥ 0.
        margin_column: column of reward margins, finite numbers.
        round_column: column of the rounds that made the pairs, integers.
        source_column: column of sources, text.
        current_round: no pair may be of a later round.
        weight_key: config key that sets the weight column, for error messages.

    Returns:
        Columns `prompt`, `chosen`, `rejected` (messages) and `key` (text, equal for equal prompts only); and for each
        column named above, `weight` (f64), `margin` (f64), `round` (i64), `source` (text).

    Raises:
        DataError: the message names the file, the line and the column.
    """
    # (result column, its dtype, column in the file, check and conversion, config key for errors)
    columns: list[tuple[str, pl.DataType, str | None, Callable[[Any, str, str], Any], str | None]] = [
        ("weight", pl.Float64(), weight_column, _weight, weight_key),
        ("margin", pl.Float64(), margin_column, _margin, None),
        ("round", pl.Int64(), round_column, partial(_round, current_round=current_round), None),
        ("source", pl.String(), source_column, _source, None),
    ]
    pairs: list[Pair] = []
    extra: dict[str, list[Any]] = {name: [] for name, _, column, _, _ in columns if column is not None}
    for where, row in read_rows(path):
        pair = _pair(row, where, prompt_column, chosen_column, rejected_column)
        if pair["chosen"] == pair["rejected"]:
            continue
        for name, _, column, check, key in columns:
            if column is not None:
                extra[name].append(check(_column(row, column, where, name, key), where, column))
        pairs.append(pair)
    if not pairs:
        raise DataError(f"{path} holds no pairs (or only pairs whose chosen equals their rejected)")
    return pairs_frame(pairs).with_columns(
        pl.Series(name, extra[name], dtype=dtype) for name, dtype, *_ in columns if name in extra
    )


def _weight(value: Any, where: str, column: str) -> float:
    if not _is_finite(value) or value < 0:
        raise DataError(f"{where}: {column!r} must be a finite number ≥ 0, got {value!r}")
    return float(value)


def _margin(value: Any, where: str, column: str) -> float:
    if not _is_finite(value):
        raise DataError(f"{where}: {column!r} must be a finite number, got {value!r}")
    return float(value)


def _round(value: Any, where: str, column: str, current_round: int | None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**62:
        raise DataError(f"{where}: {column!r} must be a whole number, got {value!r}")
    if current_round is not None and value > current_round:
        raise DataError(
            f"{where}: {column!r} is {value}, but the current round is {current_round}: a pair's age cannot be negative"
        )
    return value


def _source(value: Any, where: str, column: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {column!r} must be text, got {value!r}")
    return value


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def pairs_frame(pairs: list[Pair]) -> pl.DataFrame:
    """Columns `prompt`, `chosen`, `rejected` (messages) and `key` (`prompt_key` of the prompt)."""
    frame = pl.DataFrame(pairs, schema={"prompt": MESSAGES, "chosen": MESSAGES, "rejected": MESSAGES})
    return frame.with_columns(pl.Series("key", [prompt_key(pair["prompt"]) for pair in pairs], dtype=pl.String))
