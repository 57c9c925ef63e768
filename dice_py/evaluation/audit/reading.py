"""Reads the files that a reward can be audited on: preference pairs, votes between two models, and scored responses.

Four forms, told apart by their columns:

- preference pairs in TRL's formats, and RewardBench's rows (`prompt`, `chosen`, `rejected`, `subset`, `chosen_model`,
  `rejected_model`);
- votes, as PPE's human preferences have them: `prompt`, `response_1`, `response_2`, `winner` (model_a, model_b, or a
  tie), `model_a`, `model_b`;
- scored or verifiable responses, one a row: `prompt`, `response`, `score` or `correct`, and maybe `model`;
- the same with a prompt a row, as PPE's best-of-K sets have them: `prompt`, `response_1` … `response_K`, `scores`, and
  maybe `model_name`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import polars as pl

from dice_py.data import Message, Pair, pairs_frame, read_pairs
from dice_py.errors import DataError
from dice_py.events import Report, no_report
from dice_py.rows.bad_rows import BadRowRule, BadRows
from dice_py.rows.forms import Taken, prompt_of
from dice_py.rows.messages import read_messages
from dice_py.rows.row import Cell, Row
from dice_py.rows.sources import Source, Written, find_source
from dice_py.rows.values import finite_number
from dice_py.storage.schemas import MESSAGES, MESSAGES_WITH_EXTRA, PLACE

Form = Literal["pairs", "votes", "responses", "sets"]
_TIES = ("tie", "tie (bothbad)", "both_bad", "bothbad")


@dataclass(frozen=True)
class AuditColumns:
    """Names of columns. None: the usual name, where the file has it; a name that is given must be in every row."""

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    response: str = "response"
    score: str | None = None
    correct: str | None = None
    model: str | None = None
    chosen_model: str | None = None
    rejected_model: str | None = None
    source: str | None = None


def read_audit(
    path: Written,
    columns: AuditColumns,
    *,
    rule: BadRowRule,
    ignored: Collection[str] = (),
    report: Report = no_report,
) -> pl.DataFrame:
    """Reads a file of one of the four forms.

    Args:
        path: a file, a folder, a pattern or a data set of the hub (rows/sources.py).
        columns: names of its columns.
        rule: what happens to a row that cannot be used.
        ignored: keys of messages, and columns beside the prompt, to leave out.
        report: receives notes on rows that were left out, and on what was taken in another way.

    Returns:
        Of pairs and votes: `prompt`, `chosen`, `rejected` (messages), `where`, and, each if the file has it, `source`,
        `chosen_model` and `rejected_model` (text or null). Of scored responses, one row each: `prompt`, `response`
        (messages), `score` (f64), `where`, and maybe `source` and `model`.

    Raises:
        DataError: the file has none of the forms, or a row cannot be used.
    """
    source = find_source(path, report)
    form = form_of(source, columns)
    if form == "pairs":
        return _pairs(source, columns, rule, ignored, report)
    if form == "votes":
        return _votes(source, columns, rule, ignored, report)
    return _scored(source, columns, form, rule, ignored, report)


def form_of(path: Written, columns: AuditColumns) -> Form:
    """The form of a file, by the columns of its first row that can be read.

    Raises:
        DataError: none of the four; or no row can be read.
    """
    failure: DataError | None = None
    for line in find_source(path).rows():
        try:
            row = line.columns
        except DataError as error:
            failure = failure or error
            continue
        if {columns.chosen, columns.rejected} <= row.keys():
            return "pairs"
        if {"response_1", "response_2", "winner"} <= row.keys():
            return "votes"
        if {"response_1", columns.score or "scores"} <= row.keys():
            return "sets"
        if columns.response in row and any(name in row for name in _score_names(columns)):
            return "responses"
        raise DataError(
            f"{line.where}: no audit can be made of the columns {', '.join(row)}. It needs {columns.chosen} and "
            f"{columns.rejected}; or {columns.response} with {' or '.join(_score_names(columns))}; or PPE's response_1 "
            "… with winner or scores. Name them with --chosen-column, --rejected-column, --response-column, "
            "--score-column or --correct-column"
        )
    raise failure or DataError(f"{path} holds no rows")


def _score_names(columns: AuditColumns) -> list[str]:
    given = columns.score or columns.correct
    return [given] if given else ["score", "correct"]


def _pairs(
    path: Source, columns: AuditColumns, rule: BadRowRule, ignored: Collection[str], report: Report
) -> pl.DataFrame:
    pairs = read_pairs(
        path,
        prompt_column=columns.prompt,
        chosen_column=columns.chosen,
        rejected_column=columns.rejected,
        rule=rule,
        ignored=ignored,
        report=report,
    ).drop("key")
    texts = {
        "source": (columns.source, "subset"),
        "chosen_model": (columns.chosen_model, "chosen_model"),
        "rejected_model": (columns.rejected_model, "rejected_model"),
    }
    places = set(pairs[PLACE])
    found: dict[str, dict[str, str | None]] = {name: {} for name in texts}
    for line in path.rows():
        if line.place in places:
            for name, (given, usual) in texts.items():
                found[name][line.place] = _text(line, given, usual)
    added = {name: [values[place] for place in pairs[PLACE]] for name, values in found.items()}
    return pairs.with_columns(
        pl.Series(name, values, dtype=pl.String) for name, values in added.items() if any(v is not None for v in values)
    )


def _text(line: Row, given: str | None, usual: str) -> str | None:
    """The text of a column: null where a column of the usual name is absent, or not text."""
    value = line.columns.get(given or usual)
    if given is None:
        return value if isinstance(value, str) else None
    if given not in line.columns:
        raise DataError(f"{line.where}: no column {given!r}; its columns are {', '.join(line.columns)}")
    if value is not None and not isinstance(value, str):
        raise DataError(f"{line.where}: {given!r} must be text, got {value!r:.80}")
    return value


def _votes(
    path: Source, columns: AuditColumns, rule: BadRowRule, ignored: Collection[str], report: Report
) -> pl.DataFrame:
    pairs: list[Pair] = []
    more: dict[str, list[str | None]] = {PLACE: [], "source": [], "chosen_model": [], "rejected_model": []}
    bad, taken, ties = BadRows(rule, str(path), "votes"), Taken(str(path)), 0
    for line in path.rows():
        with bad.row():
            row, where = line.columns, line.where
            winner = row.get("winner")
            models = [_text(line, None, name) for name in ("model_a", "model_b")]
            if winner in _TIES:
                ties += 1
                continue
            if winner not in ("model_a", "model_b"):
                raise DataError(f"{where}: 'winner' is {winner!r:.60}, but must be model_a, model_b or tie")
            answers = [_answer(row, where, f"response_{number}", ignored) for number in (1, 2)]
            first = winner == "model_a"
            chosen, rejected = answers if first else answers[::-1]
            prompt = prompt_of(row, where, columns.prompt, ignored, taken)
            values = (line.place, _text(line, columns.source, "subset"), *(models if first else models[::-1]))
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
            for name, value in zip(more, values, strict=True):
                more[name].append(value)
    bad.finish(report)
    taken.finish(report)
    if ties:
        report(
            "note", text=f"{path}: {ties} of {bad.total} votes left out: they are ties, which prefer neither response"
        )
    if not pairs:
        raise DataError(f"{path} holds no votes for one of two responses")
    columns_of = [pl.Series(name, values, dtype=pl.String) for name, values in more.items()]
    return (
        pairs_frame(pairs)
        .drop("key")
        .with_columns(column for column in columns_of if column.name == PLACE or column.null_count() < len(column))
    )


def _answer(row: dict[str, Any], where: str, column: str, ignored: Collection[str]) -> list[Message]:
    if column not in row:
        raise DataError(f"{where}: no column {column!r}; its columns are {', '.join(row)}")
    messages = read_messages(row[column], "assistant", where, column, ignored)
    roles = [message["role"] for message in messages]
    if roles != ["assistant"]:
        raise DataError(f"{where}: {column!r} must be one assistant turn, got roles {roles}")
    return messages


def _scored(
    path: Source, columns: AuditColumns, form: Form, rule: BadRowRule, ignored: Collection[str], report: Report
) -> pl.DataFrame:
    rows: dict[str, list[Any]] = {name: [] for name in ("prompt", "response", "score", "model", "source", PLACE)}
    bad, taken = BadRows(rule, str(path), "rows of scored responses"), Taken(str(path))
    for line in path.rows():
        with bad.row():
            prompt = prompt_of(line.columns, line.where, columns.prompt, ignored, taken)
            read = _of_set if form == "sets" else _of_response
            answers = list(read(line, columns, ignored))  # all of a row, or none of it
            model = _text(line, columns.model, "model_name" if form == "sets" else "model")
            source = _text(line, columns.source, "subset")
            for response, score in answers:
                for name, value in zip(rows, (prompt, response, score, model, source, line.place), strict=True):
                    rows[name].append(value)
    bad.finish(report)
    taken.finish(report)
    if not rows["score"]:
        raise DataError(f"{path} holds no scored responses")
    turns = [turn for name in ("prompt", "response") for messages in rows[name] for turn in messages]
    dtype = MESSAGES_WITH_EXTRA if any(turn.get("extra") for turn in turns) else MESSAGES
    frame = pl.DataFrame(
        rows,
        schema={
            "prompt": dtype,
            "response": dtype,
            "score": pl.Float64,
            "model": pl.String,
            "source": pl.String,
            PLACE: pl.String,
        },
    )
    return frame.drop(name for name in ("model", "source") if frame[name].null_count() == frame.height)


def _of_response(line: Row, columns: AuditColumns, ignored: Collection[str]) -> Iterator[tuple[list[Message], float]]:
    """The response of a row, and its score."""
    row, where = line.columns, line.where
    names = _score_names(columns)
    name = next((name for name in names if name in row), None)
    if name is None:
        raise DataError(f"{where}: no column {' or '.join(map(repr, names))}; its columns are {', '.join(row)}")
    yield _answer(row, where, columns.response, ignored), _score(row[name], where, name)


def _of_set(line: Row, columns: AuditColumns, ignored: Collection[str]) -> Iterator[tuple[list[Message], float]]:
    """The responses of a row, and their scores."""
    row, where = line.columns, line.where
    name = columns.score or "scores"
    scores = row.get(name)
    if not isinstance(scores, list):
        raise DataError(
            f"{where}: {name!r} must be a list of the scores of response_1, response_2 …, got {scores!r:.80}"
        )
    for number, score in enumerate(scores, start=1):
        yield _answer(row, where, f"response_{number}", ignored), _score(score, where, name)


def _score(value: Any, where: str, column: str) -> float:
    if isinstance(value, Cell) and value.lower() in ("true", "false"):
        value = value.lower() == "true"
    return float(value) if isinstance(value, bool) else finite_number(value, where, column)
