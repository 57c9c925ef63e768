"""A user's prompts and offline pairs, read from JSONL, JSON or Parquet in TRL's formats, as messages.

TRL's formats: `prompt` as text or as a list of messages; `chosen` and `rejected` likewise; or, without a
prompt column, `chosen` and `rejected` as whole conversations whose common beginning is the prompt. No
tokenizer here: what needs one is in models/loading.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
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
    """One offline preference: messages only, `chosen` and `rejected` are the answers alone."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (where, row) for each row: `where` names file and line or row, for error messages.

    Raises:
        DataError: absent, empty, of an unknown kind, or a line that is not a JSON object.
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
        raise DataError(f"{path}: unknown kind {suffix!r}; give .jsonl, .json or .parquet")


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
        text = data.decode("utf-8-sig")  # some editors begin a file with a byte order mark
        value = json.loads(text)
        # Half of a surrogate pair is JSON, but no Unicode text, and so nothing that can be stored.
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start}); convert it") from None
    except UnicodeEncodeError:
        raise DataError(f"{where}: holds half of a surrogate pair, which is no text; fix or remove it") from None
    except json.JSONDecodeError as error:
        at = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise DataError(f"{where}: not valid JSON ({error.msg} at {at}); fix or remove it") from None
    except RecursionError:
        raise DataError(f"{where}: JSON nested too deeply; fix or remove it") from None
    return value


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: a JSON object is expected, not a {type(value).__name__}")
    return value


def _messages(value: Any, role: str, where: str, column: str) -> list[Message]:
    """Text becomes one message of `role`; messages are checked and reduced to role and content."""
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
        raise DataError(f"{where}: the prompt ends with an assistant turn; it must end where the answer begins")
    return messages


def read_prompts(path: Path, column: str = "prompt") -> pl.DataFrame:
    """Prompts with `prompt_id` u32 in file order and `messages`; equal prompts count once.

    A file of offline pairs serves too: without a prompt column, the common beginning of `chosen` and
    `rejected` is the prompt.

    Raises:
        DataError: naming the file, the line and the column.
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
    """The prompts artefact: `prompt_id` counts from 0 in the given order."""
    rows = list(prompts)
    return pl.DataFrame({"prompt_id": range(len(rows)), "messages": rows}, schema=PROMPTS)


def prompt_key(messages: list[Message]) -> str:
    """Equal prompts, and only those, have equal keys."""
    return json.dumps([[m["role"], m["content"]] for m in messages], ensure_ascii=False)


def _pair(row: dict[str, Any], where: str, prompt: str, chosen: str, rejected: str) -> Pair:
    answers = {
        "chosen": _messages(_column(row, chosen, where, "chosen"), "assistant", where, chosen),
        "rejected": _messages(_column(row, rejected, where, "rejected"), "assistant", where, rejected),
    }
    if prompt in row and row[prompt] is not None:
        messages = _prompt(row[prompt], where, prompt)
        # Some published sets give the prompt, and the whole conversation as the answer as well.
        for name, answer in answers.items():
            if answer[: len(messages)] == messages:
                answers[name] = answer[len(messages) :]
    else:
        shared = 0
        # The last turns are the answers, even where they are equal.
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
    """Offline pairs as columns `prompt`, `chosen`, `rejected` (messages), `key` and what else is named.

    Those are `weight` f64 (a finite number of zero or more), `margin` f64 (a finite number), `round` i64 (a whole
    number, with `current_round` not above it) and `source` (text). Pairs whose answers are equal say nothing and
    are left out. `weight_key`: the config key that names the weight column, for an error's text.

    Raises:
        DataError: naming the file, the line and the column.
    """
    pairs: list[Pair] = []
    extra: dict[str, list[Any]] = {
        name: []
        for name, column in (
            ("weight", weight_column),
            ("margin", margin_column),
            ("round", round_column),
            ("source", source_column),
        )
        if column is not None
    }
    for where, row in read_rows(path):
        pair = _pair(row, where, prompt_column, chosen_column, rejected_column)
        if pair["chosen"] == pair["rejected"]:
            continue
        if weight_column is not None:
            weight = _column(row, weight_column, where, "weight", weight_key)
            if not _is_finite(weight) or weight < 0:
                raise DataError(f"{where}: {weight_column!r} must be a finite number ≥ 0, got {weight!r}")
            extra["weight"].append(float(weight))
        if margin_column is not None:
            margin = _column(row, margin_column, where, "margin")
            if not _is_finite(margin):
                raise DataError(f"{where}: {margin_column!r} must be a finite number, got {margin!r}")
            extra["margin"].append(float(margin))
        if round_column is not None:
            made = _column(row, round_column, where, "round")
            if isinstance(made, bool) or not isinstance(made, int) or abs(made) >= 2**62:
                raise DataError(f"{where}: {round_column!r} must be a whole number, got {made!r}")
            if current_round is not None and made > current_round:
                raise DataError(
                    f"{where}: {round_column!r} is {made}, but the draw is made in round {current_round}: a pair's "
                    "age cannot be negative"
                )
            extra["round"].append(made)
        if source_column is not None:
            source = _column(row, source_column, where, "source")
            if not isinstance(source, str):
                raise DataError(f"{where}: {source_column!r} must be text, got {source!r}")
            extra["source"].append(source)
        pairs.append(pair)
    if not pairs:
        raise DataError(f"{path} holds no pairs (or only pairs whose chosen equals their rejected)")
    dtypes = {"weight": pl.Float64(), "margin": pl.Float64(), "round": pl.Int64(), "source": pl.String()}
    return pairs_frame(pairs).with_columns(pl.Series(name, found, dtype=dtypes[name]) for name, found in extra.items())


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def pairs_frame(pairs: list[Pair]) -> pl.DataFrame:
    """`prompt`, `chosen`, `rejected` as messages, and `key`, which is equal for equal prompts only."""
    frame = pl.DataFrame(pairs, schema={"prompt": MESSAGES, "chosen": MESSAGES, "rejected": MESSAGES})
    return frame.with_columns(pl.Series("key", [prompt_key(pair["prompt"]) for pair in pairs], dtype=pl.String))
