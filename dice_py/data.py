"""Reads a user's prompts and offline pairs from JSONL, JSON or Parquet files in TRL's formats.

TRL's formats: `prompt` as text or as a list of messages; `chosen` and `rejected` likewise; or, without a prompt column,
`chosen` and `rejected` as full conversations whose common beginning is the prompt. Beside them there may be `tools`,
`chat_template_kwargs`, and a `system` turn. The results are messages (rows/messages.py); models/tokenization.py turns
them into token ids.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import polars as pl

from dice_py.errors import DataError
from dice_py.events import Report, no_report
from dice_py.rows.bad_rows import BadRowRule, BadRows
from dice_py.rows.messages import Message as Message
from dice_py.rows.messages import prompt_key as prompt_key
from dice_py.rows.messages import read_messages, with_row_columns
from dice_py.rows.reading import read_rows
from dice_py.storage.schemas import MESSAGES, MESSAGES_WITH_EXTRA, PLACE, PROMPTS


class Pair(TypedDict):
    """One offline preference pair as messages; `chosen` and `rejected` hold the responses without the prompt."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


_RULE = BadRowRule()


def _column(row: dict[str, Any], column: str, where: str, option: str, key: str | None = None) -> Any:
    if column not in row:
        raise DataError(
            f"{where}: no column {column!r}; its columns are {', '.join(row)}. Name the right one with "
            + (f"--{option}-column (in a run: --set data.{option}_column=NAME)" if key is None else f"--set {key}=NAME")
        )
    return row[column]


def _prompt(value: Any, where: str, column: str, ignored: Collection[str]) -> list[Message]:
    messages = read_messages(value, "user", where, column, ignored)
    asked = [message for message in messages if message["role"] == "user"]
    if not asked:
        raise DataError(f"{where}: the prompt has no user turn; its roles are {[m['role'] for m in messages]}")
    if not any(message["content"].strip() or message.get("extra") for message in asked):
        raise DataError(f"{where}: every user turn of {column!r} is empty")
    if messages[-1]["role"] == "assistant":
        raise DataError(f"{where}: the prompt ends with an assistant turn; it must end where the response begins")
    return messages


def read_prompts(
    path: Path,
    column: str = "prompt",
    *,
    rule: BadRowRule = _RULE,
    ignored: Collection[str] = (),
    report: Report = no_report,
) -> pl.DataFrame:
    """Reads prompts. Equal prompts are kept once.

    A file of offline pairs works too: without a prompt column, the common beginning of `chosen` and `rejected` is the
    prompt.

    Args:
        path: a file in one of TRL's formats.
        column: column of the prompt.
        rule: what happens to a row that cannot be used.
        ignored: keys of messages, and columns beside the prompt, to leave out.
        report: receives a note with the rows that were left out.

    Returns:
        Columns `prompt_id` (u32, in file order), `messages`, and `where` (text: the file's name and the row's place).

    Raises:
        DataError: the message names the file, the line and the column.
    """
    seen: dict[str, tuple[list[Message], str]] = {}
    bad = BadRows(rule, str(path), "prompts")
    for line in read_rows(path):
        with bad.row():
            row, where = line.columns, line.where
            if column not in row and "messages" in row and column == "prompt":
                messages = _prompt(row["messages"], where, "messages", ignored)
            elif column not in row and {"chosen", "rejected"} <= row.keys():
                messages = _pair(row, where, column, "chosen", "rejected", ignored)["prompt"]
            else:
                messages = _prompt(_column(row, column, where, "prompt"), where, column, ignored)
            messages = _with_columns(messages, row, where, column, ignored)
            seen.setdefault(prompt_key(messages), (messages, line.place))
    bad.finish(report)
    if not seen:
        raise DataError(f"{path} holds no prompts")
    places = pl.Series(PLACE, [place for _, place in seen.values()], dtype=pl.String)
    return prompts_frame([messages for messages, _ in seen.values()]).with_columns(places)


def prompt_of(row: dict[str, Any], where: str, column: str, ignored: Collection[str]) -> list[Message]:
    """The prompt of a row: a column of text or messages, with the columns beside it that are a part of it.

    Raises:
        DataError: the column is absent or holds no prompt; `where` names the row.
    """
    messages = _prompt(_column(row, column, where, "prompt"), where, column, ignored)
    return _with_columns(messages, row, where, column, ignored)


def _with_columns(
    messages: list[Message], row: dict[str, Any], where: str, column: str, ignored: Collection[str]
) -> list[Message]:
    """The prompt with the columns beside it; a column that is the prompt itself is none of them."""
    return with_row_columns(messages, row, where, {*ignored, column})


def prompts_frame(prompts: Iterable[list[Message]]) -> pl.DataFrame:
    """The prompts artifact: `prompt_id` counts from 0 in the order of `prompts`."""
    rows = list(prompts)
    schema = PROMPTS | {"messages": _dtype(rows)}
    return pl.DataFrame({"prompt_id": range(len(rows)), "messages": rows}, schema=schema)


def _dtype(conversations: Iterable[list[Message]]) -> pl.DataType:
    """MESSAGES; with the field `extra` where any message has one."""
    has_extra = any(message.get("extra") for messages in conversations for message in messages)
    return MESSAGES_WITH_EXTRA if has_extra else MESSAGES


def _pair(row: dict[str, Any], where: str, prompt: str, chosen: str, rejected: str, ignored: Collection[str]) -> Pair:
    answers = {
        "chosen": read_messages(_column(row, chosen, where, "chosen"), "assistant", where, chosen, ignored),
        "rejected": read_messages(_column(row, rejected, where, "rejected"), "assistant", where, rejected, ignored),
    }
    if prompt in row and row[prompt] is not None:
        messages = _prompt(row[prompt], where, prompt, ignored)
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
            raise _no_prompt(row, where, prompt, chosen, rejected)
        messages = _prompt(answers["chosen"][:shared], where, chosen, ignored)
        answers = {name: answer[shared:] for name, answer in answers.items()}
    for name, answer in answers.items():
        if [message["role"] for message in answer] != ["assistant"]:
            raise DataError(
                f"{where}: {name!r} must be one assistant turn after the prompt, got roles "
                f"{[message['role'] for message in answer]}"
            )
        if not answer[0]["content"].strip() and not answer[0].get("extra"):
            raise DataError(f"{where}: {name!r} is an empty text")
    return {"prompt": messages, "chosen": answers["chosen"], "rejected": answers["rejected"]}


def _no_prompt(row: dict[str, Any], where: str, prompt: str, chosen: str, rejected: str) -> DataError:
    if prompt in row:
        return DataError(
            f"{where}: {prompt!r} is null, and {chosen!r} and {rejected!r} have no common beginning that could be the "
            "prompt"
        )
    return DataError(
        f"{where}: no column {prompt!r}, and {chosen!r} and {rejected!r} have no common beginning; "
        f"its columns are {', '.join(row)}. Name the prompt's with --prompt-column (in a run: "
        "--set data.prompt_column=NAME)"
    )


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
    rule: BadRowRule = _RULE,
    ignored: Collection[str] = (),
    report: Report = no_report,
) -> pl.DataFrame:
    """Reads offline pairs. Pairs whose chosen and rejected responses are equal are left out, and counted in a note.

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
        rule: what happens to a row that cannot be used.
        ignored: keys of messages, and columns beside the prompt, to leave out.
        report: receives a note with the rows that were left out.

    Returns:
        Columns `prompt`, `chosen`, `rejected` (messages), `key` (text, equal for equal prompts only) and `where` (text:
        the file's name and the row's place); and for each column named above, `weight` (f64), `margin` (f64), `round`
        (i64), `source` (text).

    Raises:
        DataError: the message names the file, the line and the column.
    """
    # (result column, its dtype, column in the file, check and conversion, config key for errors)
    columns: list[tuple[str, pl.DataType, str | None, Callable[[Any, str, str], Any], str | None]] = [
        ("weight", pl.Float64(), weight_column, _weight, weight_key),
        ("margin", pl.Float64(), margin_column, finite_number, None),
        ("round", pl.Int64(), round_column, partial(_round, current_round=current_round), None),
        ("source", pl.String(), source_column, _source, None),
    ]
    columns = [one for one in columns if one[2] is not None]
    pairs: list[tuple[Pair, str, list[Any]]] = []
    equal = 0
    bad = BadRows(rule, str(path), "pairs")
    for line in read_rows(path):
        with bad.row():
            row, where = line.columns, line.where
            pair = _pair(row, where, prompt_column, chosen_column, rejected_column, ignored)
            pair["prompt"] = _with_columns(pair["prompt"], row, where, prompt_column, ignored)
            if pair["chosen"] == pair["rejected"]:
                equal += 1
                continue
            values = [
                check(_column(row, column or "", where, name, key), where, column or "")
                for name, _, column, check, key in columns
            ]
            pairs.append((pair, line.place, values))
    bad.finish(report)
    if equal:
        report("note", text=f"{path}: {equal} of {bad.total} pairs left out: chosen and rejected are equal")
    if not pairs:
        raise DataError(f"{path} holds no pairs (or only pairs whose chosen equals their rejected)")
    return pairs_frame([pair for pair, *_ in pairs]).with_columns(
        pl.Series(PLACE, [place for _, place, _ in pairs], dtype=pl.String),
        *(
            pl.Series(name, [values[at] for *_, values in pairs], dtype=dtype)
            for at, (name, dtype, *_) in enumerate(columns)
        ),
    )


def read_responses(
    path: Path,
    *,
    prompt_column: str = "prompt",
    response_column: str = "response",
    rule: BadRowRule = _RULE,
    ignored: Collection[str] = (),
    report: Report = no_report,
) -> pl.DataFrame:
    """Reads responses to prompts, one row each. A row without these columns may have AlpacaEval's: instruction, output.

    Args:
        path: JSONL, JSON or Parquet.
        prompt_column: column of the prompt, as text or messages.
        response_column: column of the response, as text or as one assistant turn. It may be empty, but not null.
        rule: what happens to a row that cannot be used.
        ignored: keys of messages, and columns beside the prompt, to leave out.
        report: receives a note with the rows that were left out.

    Returns:
        Columns `messages`, `key` (text, equal for equal prompts only), `response` (text), `generator` and `dataset`
        (text or null), as AlpacaEval's files have them, and `where` (text: the file's name and the row's place).

    Raises:
        DataError: the message names the file, the line and the column.
    """
    rows: list[tuple[list[Message], str, str, str | None, str | None, str]] = []
    bad = BadRows(rule, str(path), "responses")
    for line in read_rows(path):
        with bad.row():
            row, where = line.columns, line.where
            prompt = "instruction" if prompt_column not in row and "instruction" in row else prompt_column
            response = "output" if response_column not in row and "output" in row else response_column
            messages = _prompt(_column(row, prompt, where, "prompt"), where, prompt, ignored)
            messages = _with_columns(messages, row, where, prompt, ignored)
            if response not in row:
                columns = ", ".join(row)
                raise DataError(
                    f"{where}: no column {response!r}; its columns are {columns}. Name it with --response-column"
                )
            text = _response(row[response], where, response)
            labels = [row.get(name) if isinstance(row.get(name), str) else None for name in ("generator", "dataset")]
            rows.append((messages, prompt_key(messages), text, labels[0], labels[1], line.place))
    bad.finish(report)
    if not rows:
        raise DataError(f"{path} holds no responses")
    schema = {"messages": _dtype(row[0] for row in rows)} | dict.fromkeys(
        ("key", "response", "generator", "dataset", PLACE), pl.String()
    )
    return pl.DataFrame(rows, schema=schema, orient="row")


def _response(value: Any, where: str, column: str) -> str:
    if isinstance(value, str):
        return value
    turns = read_messages(value, "assistant", where, column)
    if [turn["role"] for turn in turns] != ["assistant"] or turns[0].get("extra"):
        raise DataError(f"{where}: {column!r} must be text, or one assistant turn of text, got {value!r:.80}")
    return turns[0]["content"]


def _weight(value: Any, where: str, column: str) -> float:
    if not _is_finite(value) or value < 0:
        raise DataError(f"{where}: {column!r} must be a finite number ≥ 0, got {value!r:.80}")
    return float(value)


def finite_number(value: Any, where: str, column: str) -> float:
    """A number of a row.

    Raises:
        DataError: it is no number, or is not finite.
    """
    if not _is_finite(value):
        raise DataError(f"{where}: {column!r} must be a finite number, got {value!r:.80}")
    return float(value)


def _round(value: Any, where: str, column: str, current_round: int | None) -> int:
    if isinstance(value, float | Decimal) and _is_finite(value) and value == int(value):
        value = int(value)  # as Pandas and databases write whole numbers
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**62:
        raise DataError(f"{where}: {column!r} must be a whole number, got {value!r:.80}")
    if current_round is not None and value > current_round:
        raise DataError(
            f"{where}: {column!r} is {value}, but the current round is {current_round}: a pair's age cannot be negative"
        )
    return value


def _source(value: Any, where: str, column: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {column!r} must be text, got {value!r:.80}")
    return value


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return False
    if isinstance(value, Decimal) and not value.is_finite():
        return False
    return -sys.float_info.max <= value <= sys.float_info.max


def pairs_frame(pairs: list[Pair]) -> pl.DataFrame:
    """Columns `prompt`, `chosen`, `rejected` (messages) and `key` (`prompt_key` of the prompt)."""
    schema = {
        "prompt": _dtype(pair["prompt"] for pair in pairs),
        "chosen": _dtype(pair["chosen"] for pair in pairs),
        "rejected": _dtype(pair["rejected"] for pair in pairs),
    }
    frame = pl.DataFrame(pairs, schema=schema)
    return frame.with_columns(pl.Series("key", [prompt_key(pair["prompt"]) for pair in pairs], dtype=pl.String))


def file_places(pairs: pl.DataFrame, noun: str) -> list[str]:
    """What messages call each row: its place in the user's file, or "pair 3" where that is not known."""
    if PLACE in pairs.columns:
        return pairs[PLACE].to_list()
    numbers = pairs["prompt_id"].to_list() if "prompt_id" in pairs.columns else range(pairs.height)
    return [f"{noun} {number}" for number in numbers]
