"""The forms in which published data has prompts: other columns than `prompt`, training data, transcripts as text.

Which column is the prompt: the configured one, if it is there. Else, where that is `prompt`, the first of
`PROMPT_COLUMNS` that is. What was taken is a note, one for the source.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from typing import Any

from dice_py.errors import DataError
from dice_py.events import Report
from dice_py.rows.messages import Message, read_messages, with_row_columns

PROMPT = "prompt"
PROMPT_COLUMNS = (PROMPT, "instruction", "question", "messages", "conversations")
_CONVERSATIONS = ("messages", "conversations")
"""Columns that may hold training data: conversations with the answer as their end."""
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_TRANSCRIPT = re.compile(r"\s*Human:")


class Taken:
    """What was taken of the rows of one source, other than their columns say: it is told once, and counted."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.column: str | None = None
        """The prompt's, as the first row that has one decides for all of the source."""
        self.counts: Counter[str] = Counter()

    def add(self, text: str) -> None:
        """Counts a row under a sentence about it."""
        self.counts[text] += 1

    def finish(self, report: Report) -> None:
        """Reports one note, if there is something to tell."""
        if self.counts:
            told = "; ".join(f"{text} ({count} row{'s' * (count != 1)})" for text, count in self.counts.items())
            report("note", text=f"{self.source}: {told}")


def prompt_column(row: dict[str, Any], column: str, taken: Taken) -> str:
    """The name of the column that holds a row's prompt: `column` itself where there is no other either."""
    if taken.column is None:
        known = PROMPT_COLUMNS if column == PROMPT else (column,)
        taken.column = next((name for name in known if name in row), None)
    return column if column in row or taken.column is None else taken.column


def prompt_of(row: dict[str, Any], where: str, column: str, ignored: Collection[str], taken: Taken) -> list[Message]:
    """The prompt of a row: a column of text or messages, with the columns beside it that are a part of it.

    Args:
        row: the row.
        where: names it in errors.
        column: the configured column.
        ignored: keys of messages, and columns beside the prompt, to leave out.
        taken: of the row's source.

    Raises:
        DataError: the column is absent, or holds no prompt.
    """
    messages = bare_prompt(row, where, column, ignored, taken)
    # A column that is the prompt itself is none of those beside it.
    return with_row_columns(messages, row, where, {*ignored, prompt_column(row, column, taken)})


def bare_prompt(row: dict[str, Any], where: str, column: str, ignored: Collection[str], taken: Taken) -> list[Message]:
    """As `prompt_of`, without the columns beside the prompt."""
    name = prompt_column(row, column, taken)
    if name not in row:
        raise no_column(row, where, column, "prompt")
    messages = read_messages(row[name], "user", where, name, ignored)
    if name != column:
        taken.add(f"no column {column!r}, so the prompt is {name!r}")
    if name in _CONVERSATIONS and messages[-1]["role"] == "assistant" and len(messages) > 1:
        messages = messages[:-1]
        taken.add(f"{name!r} ends with an answer, and the prompt is what stands before it")
    if name == "instruction" and "input" not in ignored and _joined(messages, row.get("input"), where):
        taken.add("the prompt is 'instruction', an empty line and 'input'")
    return checked_prompt(messages, where, name)


def _joined(messages: list[Message], more: Any, where: str) -> bool:
    """Adds Alpaca's `input` to its instruction; False where there is none."""
    if more is None or (isinstance(more, str) and not more.strip()):
        return False
    if not isinstance(more, str) or len(messages) > 1:
        raise DataError(
            f"{where}: 'input' belongs to the instruction, and both must be text: write them into one column, or leave "
            "it out with data.ignored_keys=[input]"
        )
    messages[0] = {**messages[0], "content": f"{messages[0]['content']}\n\n{more}"}
    return True


def checked_prompt(messages: list[Message], where: str, column: str) -> list[Message]:
    """The messages, if they can be a prompt.

    Raises:
        DataError: no user turn says anything, or the end is an assistant turn.
    """
    asked = [message for message in messages if message["role"] == "user"]
    if not asked:
        raise DataError(f"{where}: the prompt has no user turn; its roles are {[m['role'] for m in messages]}")
    if not any(message["content"].strip() or message.get("extra") for message in asked):
        raise DataError(f"{where}: every user turn of {column!r} is empty")
    if messages[-1]["role"] == "assistant":
        raise DataError(f"{where}: the prompt ends with an assistant turn; it must end where the response begins")
    return messages


def no_column(row: dict[str, Any], where: str, column: str, option: str, key: str | None = None) -> DataError:
    """The error about a row without a column that `option` (or the config key `key`) names."""
    return DataError(
        f"{where}: no column {column!r}; its columns are {', '.join(row)}. Name the right one with "
        + (f"--{option}-column (in a run: --set data.{option}_column=NAME)" if key is None else f"--set {key}=NAME")
    )


def read_transcript(value: Any) -> list[Message] | None:
    """The turns of a conversation that is one text, "\\n\\nHuman: …\\n\\nAssistant: …", as hh-rlhf has it.

    None for any other value. A turn begins after an empty line. "Human:" anywhere else is a part of what is said.
    """
    if not isinstance(value, str) or _TRANSCRIPT.match(value) is None:
        return None
    _, *parts = _TURN.split(value)
    return [
        {"role": _SPEAKERS[speaker], "content": text.strip()}
        for speaker, text in zip(parts[::2], parts[1::2], strict=True)
    ]
