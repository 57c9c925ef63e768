"""Reads a user's prompts and offline pairs, from any source (rows/sources.py), in the forms that published data has.

TRL's formats: `prompt` as text or as a list of messages; `chosen` and `rejected` likewise; or, without a prompt column,
`chosen` and `rejected` as full conversations whose common beginning is the prompt. Beside them there may be `tools`,
`chat_template_kwargs`, and a `system` turn. rows/forms.py has the other forms. The results are messages
(rows/messages.py); models/tokenization.py turns them into token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any, TypedDict

import polars as pl

from dice_py.errors import DataError
from dice_py.events import Report, no_report
from dice_py.rows.bad_rows import BadRowRule, BadRows
from dice_py.rows.forms import Taken, bare_prompt, checked_prompt, no_column, prompt_column, prompt_of, read_transcript
from dice_py.rows.messages import Message as Message
from dice_py.rows.messages import prompt_key as prompt_key
from dice_py.rows.messages import read_messages, with_row_columns
from dice_py.rows.sources import Written, find_source
from dice_py.rows.values import finite_number, round_number, source_name, weight
from dice_py.storage.schemas import MESSAGES, MESSAGES_WITH_EXTRA, PLACE, PROMPTS


class Pair(TypedDict):
    """One offline preference pair as messages; `chosen` and `rejected` hold the responses without the prompt."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


_RULE = BadRowRule()
_SIDES = ("chosen", "rejected")
_SCORES = ("score_chosen", "score_rejected")
"""UltraFeedback's columns, whose difference is the margin of a pair."""


def _column(row: dict[str, Any], column: str, where: str, option: str, key: str | None = None) -> Any:
    if column not in row:
        raise no_column(row, where, column, option, key)
    return row[column]


def read_prompts(
    path: Written,
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
        path: what the user wrote: a file, a folder, a pattern or a data set of the hub, with a split or a slice.
        column: column of the prompt; rows without `prompt` may have another of `rows.forms.PROMPT_COLUMNS`.
        rule: what happens to a row that cannot be used.
        ignored: keys of messages, and columns beside the prompt, to leave out.
        report: receives notes on the rows that were left out, and on what was taken in another way.

    Returns:
        Columns `prompt_id` (u32, in file order), `messages`, and `where` (text: the file's name and the row's place).

    Raises:
        DataError: the message names the file, the line and the column.
    """
    seen: dict[str, tuple[list[Message], str]] = {}
    source = find_source(path, report)
    bad, taken = BadRows(rule, str(path), "prompts"), Taken(str(path))
    for line in source.rows():
        with bad.row():
            row, where = line.columns, line.where
            if row.get(column) is None and {"chosen", "rejected"} <= row.keys():
                messages = _pair(row, where, column, "chosen", "rejected", ignored, taken)["prompt"]
            else:
                messages = prompt_of(row, where, column, ignored, taken)
            seen.setdefault(prompt_key(messages), (messages, line.place))
    bad.finish(report)
    taken.finish(report)
    if not seen:
        raise DataError(f"{path} holds no prompts")
    places = pl.Series(PLACE, [place for _, place in seen.values()], dtype=pl.String)
    return prompts_frame([messages for messages, _ in seen.values()]).with_columns(places)


def prompts_frame(prompts: Iterable[list[Message]]) -> pl.DataFrame:
    """The prompts artifact: `prompt_id` counts from 0 in the order of `prompts`."""
    rows = list(prompts)
    schema = PROMPTS | {"messages": _dtype(rows)}
    return pl.DataFrame({"prompt_id": range(len(rows)), "messages": rows}, schema=schema)


def _dtype(conversations: Iterable[list[Message]]) -> pl.DataType:
    """MESSAGES; with the field `extra` where any message has one."""
    has_extra = any(message.get("extra") for messages in conversations for message in messages)
    return MESSAGES_WITH_EXTRA if has_extra else MESSAGES


def _pair(
    row: dict[str, Any],
    where: str,
    prompt: str,
    chosen: str,
    rejected: str,
    ignored: Collection[str],
    taken: Taken,
) -> Pair:
    is_given = row.get(prompt) is not None
    answers = _answers(row, where, (chosen, rejected), ignored, taken, as_transcripts=not is_given)
    shared = 0 if is_given else _common(*answers.values())
    if shared:
        messages = checked_prompt(answers["chosen"][:shared], where, chosen)
        answers = {name: answer[shared:] for name, answer in answers.items()}
        complete = with_row_columns(messages, row, where, {*ignored, prompt})
    else:
        column = prompt_column(row, prompt, taken)
        if row.get(column) is None:
            raise _no_prompt(row, where, prompt, chosen, rejected)
        messages = bare_prompt(row, where, prompt, ignored, taken)
        complete = with_row_columns(messages, row, where, {*ignored, column})
        # Some published datasets have a prompt column, and full conversations as chosen and rejected.
        for name, answer in answers.items():
            if answer[: len(messages)] == messages:
                answers[name] = answer[len(messages) :]
    for name, answer in answers.items():
        if [message["role"] for message in answer] != ["assistant"]:
            raise DataError(
                f"{where}: {name!r} must be one assistant turn after the prompt, got roles "
                f"{[message['role'] for message in answer]}"
            )
        if not answer[0]["content"].strip() and not answer[0].get("extra"):
            raise DataError(f"{where}: {name!r} is an empty text")
    return {"prompt": complete, "chosen": answers["chosen"], "rejected": answers["rejected"]}


def _answers(
    row: dict[str, Any],
    where: str,
    columns: tuple[str, str],
    ignored: Collection[str],
    taken: Taken,
    as_transcripts: bool,
) -> dict[str, list[Message]]:
    """What the columns of chosen and rejected hold, with the prompt where they repeat it."""
    values = [_column(row, column, where, name) for name, column in zip(_SIDES, columns, strict=True)]
    if as_transcripts:
        transcripts = [read_transcript(value) for value in values]
        if transcripts[0] is not None and transcripts[1] is not None:
            taken.add(
                f"{columns[0]!r} and {columns[1]!r} are transcripts, and read as the turns of Human and Assistant"
            )
            return {"chosen": transcripts[0], "rejected": transcripts[1]}
    return {
        name: read_messages(value, "assistant", where, column, ignored)
        for name, column, value in zip(_SIDES, columns, values, strict=True)
    }


def _common(chosen: list[Message], rejected: list[Message]) -> int:
    """How many turns two conversations share at their beginning. The last are the responses, even if they are equal."""
    shared = 0
    for left, right in zip(chosen[:-1], rejected[:-1], strict=False):
        if left != right:
            break
        shared += 1
    return shared


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
    path: Written,
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
        path: as of `read_prompts`.
        prompt_column: column of the prompt; as of `read_prompts`.
        chosen_column: column of the preferred response.
        rejected_column: column of the other response.
        weight_column: column of sampling weights, finite numbers ≥ 0.
        margin_column: column of reward margins, finite numbers; rows without `margin` may have `score_chosen` and
            `score_rejected`.
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
        ("weight", pl.Float64(), weight_column, weight, weight_key),
        ("margin", pl.Float64(), margin_column, finite_number, None),
        ("round", pl.Int64(), round_column, partial(round_number, current_round=current_round), None),
        ("source", pl.String(), source_column, source_name, None),
    ]
    columns = [one for one in columns if one[2] is not None]
    pairs: list[tuple[Pair, str, list[Any]]] = []
    equal = 0
    source = find_source(path, report)
    bad, taken = BadRows(rule, str(path), "pairs"), Taken(str(path))
    for line in source.rows():
        with bad.row():
            row, where = line.columns, line.where
            pair = _pair(row, where, prompt_column, chosen_column, rejected_column, ignored, taken)
            row = row if margin_column is None else _with_margin(row, where, margin_column, taken)
            if pair["chosen"] == pair["rejected"]:
                equal += 1
                continue
            values = [
                check(_column(row, column or "", where, name, key), where, column or "")
                for name, _, column, check, key in columns
            ]
            pairs.append((pair, line.place, values))
    bad.finish(report)
    taken.finish(report)
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


def _with_margin(row: dict[str, Any], where: str, column: str, taken: Taken) -> dict[str, Any]:
    """The row with the margin of UltraFeedback's scores, where it has no margin of its own."""
    if column != "margin" or column in row or not set(_SCORES) <= row.keys():
        return row
    chosen, rejected = (finite_number(row[name], where, name) for name in _SCORES)
    taken.add("no column 'margin', so it is 'score_chosen' − 'score_rejected'")
    return {**row, column: chosen - rejected}


def read_responses(
    path: Written,
    *,
    prompt_column: str = "prompt",
    response_column: str = "response",
    rule: BadRowRule = _RULE,
    ignored: Collection[str] = (),
    report: Report = no_report,
) -> pl.DataFrame:
    """Reads responses to prompts, one row each. A row without these columns may have AlpacaEval's: instruction, output.

    Args:
        path: as of `read_prompts`.
        prompt_column: column of the prompt, as text or messages; as of `read_prompts`.
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
    source = find_source(path, report)
    bad, taken = BadRows(rule, str(path), "responses"), Taken(str(path))
    for line in source.rows():
        with bad.row():
            row, where = line.columns, line.where
            prompt = "instruction" if prompt_column not in row and "instruction" in row else prompt_column
            response = "output" if response_column not in row and "output" in row else response_column
            messages = prompt_of(row, where, prompt, ignored, taken)
            if response not in row:
                columns = ", ".join(row)
                raise DataError(
                    f"{where}: no column {response!r}; its columns are {columns}. Name it with --response-column"
                )
            text = _response(row[response], where, response)
            labels = [row.get(name) if isinstance(row.get(name), str) else None for name in ("generator", "dataset")]
            rows.append((messages, prompt_key(messages), text, labels[0], labels[1], line.place))
    bad.finish(report)
    taken.finish(report)
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
