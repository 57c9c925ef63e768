"""Messages of a conversation: what a user's file may hold, and the one form that artifacts have.

A message has a role and a content as text; ShareGPT's `from` and `value` are read as these. All else that it says
(tool_calls, tool_call_id, reasoning_content, name) is kept in `extra`, as JSON text, and reaches the chat template
(models/chat_template.py). Nothing is dropped: a key that the template does not render is an error there, unless
data.ignored_keys lists it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any, NotRequired, TypedDict

from dice_py.errors import DataError


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str
    extra: NotRequired[str | None]
    """JSON text of {"message": the turn's other fields, "conversation": tools and chat_template_kwargs}.

    The second is of the first turn alone. Absent or None where there is neither.
    """


SYSTEM_COLUMNS = ("system", "system_prompt")
"""Columns beside the prompt that hold its system turn, as Orca's have."""
TOOLS_COLUMN, TEMPLATE_COLUMN = "tools", "chat_template_kwargs"
"""TRL's columns for the functions that the model may call, and for variables of the template."""
ROW_COLUMNS = (*SYSTEM_COLUMNS, TOOLS_COLUMN, TEMPLATE_COLUMN)

_SENSES = ("images", "image", "videos", "video", "audios", "audio")
_PARTS = {
    "history": "beside the prompt holds earlier turns, which are not read: write them as messages of the prompt, or",
    "functions": "is not read: rename it to tools, or",
    "documents": "is not read: write them into the prompt, or",
}
# Arguments of apply_chat_template, and variables that transformers gives to a template.
_RESERVED = frozenset(
    ("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize", "padding",
     "continue_final_message", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs",
     "return_assistant_tokens_mask", "strftime_now", "raise_exception", "self")
)  # fmt: skip
_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant"}
_SPEAKERS |= {"chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
_SPEAKERS |= {"system": "system", "tool": "tool", "observation": "tool"}
"""Who speaks in ShareGPT's form, and in LLaMA-Factory's, by role."""
_PYTHON_TEXT = re.compile(r"\s*\[\s*\{\s*'(role|content|from|value)'\s*:")


def fields_of(message: Message) -> dict[str, Any]:
    """A message as a chat template sees it: role, content and the other fields."""
    return {"role": message["role"], "content": message["content"], **_extra(message).get("message", {})}


def options_of(messages: list[Message]) -> dict[str, Any]:
    """`tools` and `chat_template_kwargs` of a conversation, if it has them."""
    options: dict[str, Any] = _extra(messages[0]).get("conversation", {}) if messages else {}
    return options


def _extra(message: Message) -> dict[str, Any]:
    extra = message.get("extra")
    return json.loads(extra) if extra else {}


def prompt_key(messages: list[Message]) -> str:
    """A text that is equal for equal prompts only; tools and all other fields count."""
    return json.dumps(
        [[m["role"], m["content"], *([m["extra"]] if m.get("extra") else [])] for m in messages], ensure_ascii=False
    )


def read_messages(value: Any, role: str, where: str, column: str, ignored: Collection[str] = ()) -> list[Message]:
    """Messages from text (one turn of `role`), a list of messages, one message, or either as JSON text.

    Raises:
        DataError: `where` and `column` are in the message.
    """
    if isinstance(value, str):
        value = _messages_in_text(value, where, column)
    elif isinstance(value, dict):
        value = _wrapped(value)
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"{where}: {column!r} is an empty text")
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: {column!r} must be text or a non-empty list of messages, got {_shown(value)}")
    return [_message(item, where, column, ignored) for item in value]


def _wrapped(value: dict[str, Any]) -> list[Any]:
    """The messages of an object that wraps a list of them, or that is a single one."""
    return next((value[name] for name in ("messages", "conversations") if isinstance(value.get(name), list)), [value])


def _shown(value: Any) -> str:
    return "None (null)" if value is None else f"{value!r:.80}"


def _messages_in_text(text: str, where: str, column: str) -> Any:
    """The list of messages that a text holds as JSON, as CSV files and some exports keep it; else the text itself."""
    if _PYTHON_TEXT.match(text):
        raise DataError(
            f"{where}: {column!r} is a list of messages written as Python text ({text[:40]!r}…); write it as JSON, or "
            "as a list"
        )
    if not text.lstrip().startswith(("[", "{", '"[', '"{')):
        return text
    try:
        value = json.loads(text)
        value = json.loads(value) if isinstance(value, str) else value  # an export of what was JSON text already
    except (ValueError, RecursionError):
        return text
    if isinstance(value, dict):
        value = _wrapped(value)
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        named = [{"role", "content"} & item.keys() == {"role", "content"} for item in value]
        shared = [{"from", "value"} <= item.keys() or "role" in item for item in value]
        if any(named) or all(shared):
            return value
    return text


def _of_sharegpt(item: dict[str, Any], where: str, column: str) -> dict[str, Any]:
    """A message of ShareGPT's form, {"from", "value"}, as one with a role."""
    speaker = item["from"]
    role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise DataError(
            f"{where}: {column!r} has a turn from {speaker!r:.40}, which is none of {', '.join(_SPEAKERS)}; write it "
            "as a message with role and content (a call of a tool: with tool_calls)"
        )
    rest = {name: value for name, value in item.items() if name not in ("from", "value")}
    return {"role": role, "content": item["value"], **rest}


def _message(item: Any, where: str, column: str, ignored: Collection[str]) -> Message:
    if isinstance(item, dict) and {"from", "value"} <= item.keys() and "role" not in item:
        item = _of_sharegpt(item, where, column)
    if not isinstance(item, dict) or not isinstance(item.get("role"), str):
        raise DataError(f"{where}: {column!r} holds {item!r:.80}, not a message with role and content as text")
    fields = {
        name: value
        for name, value in item.items()
        if name not in ("role", "content", *ignored) and not _is_nothing(value)
    }
    content = item.get("content")
    if content is None and fields:
        content = ""  # as OpenAI's format has it beside tool_calls
    if isinstance(content, list):
        content = "".join(_part(part, where, column, ignored) for part in content)
    if not isinstance(content, str):
        raise DataError(f"{where}: {column!r} holds {item!r:.80}, not a message with role and content as text")
    message: Message = {"role": item["role"], "content": content}
    if fields:
        message["extra"] = _json({"message": fields}, where, column)
    return message


def _is_nothing(value: Any) -> bool:
    """True for null, "", [], {} and False, which say the same as an absent key."""
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def _part(part: Any, where: str, column: str, ignored: Collection[str]) -> str:
    """The text of a part of a content that is a list of parts."""
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        others = [name for name in part if name not in ("type", "text", *ignored) and not _is_nothing(part[name])]
        if others:
            raise DataError(
                f"{where}: a part of a message in {column!r} has the key {others[0]!r}, which cannot be rendered; "
                f"remove it, or leave it out with data.ignored_keys=[{others[0]}]"
            )
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else part
    raise DataError(f"{where}: a message in {column!r} has a part {kind!r:.60}; only parts of text can be used")


def _json(value: Any, where: str, column: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):  # dates and bytes of a Parquet file, NaN, numbers beyond a float
        raise DataError(f"{where}: {column!r} holds {_shown(value)}, which is not JSON; convert it to text") from None


def with_row_columns(
    messages: list[Message], row: dict[str, Any], where: str, ignored: Collection[str] = ()
) -> list[Message]:
    """The prompt with what the columns beside it say: a system turn, tools, and variables of the template.

    Args:
        messages: the prompt.
        row: the complete row, with the columns of ROW_COLUMNS or without.
        ignored: columns to leave out.

    Raises:
        DataError: a column that cannot be read, or that contradicts the prompt.
    """
    _check_all_read(row, where, ignored)
    for column in SYSTEM_COLUMNS:
        if column not in ignored:
            messages = _with_system(messages, row.get(column), where, column)
    options: dict[str, Any] = {}
    tools = None if TOOLS_COLUMN in ignored else _decoded(row.get(TOOLS_COLUMN), where, TOOLS_COLUMN)
    if not _is_nothing(tools):
        tools = [tools] if isinstance(tools, dict) else tools
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise DataError(f"{where}: {TOOLS_COLUMN!r} must be a list of JSON objects, got {tools!r:.80}")
        options[TOOLS_COLUMN] = tools
    variables = None if TEMPLATE_COLUMN in ignored else _decoded(row.get(TEMPLATE_COLUMN), where, TEMPLATE_COLUMN)
    if not _is_nothing(variables):
        if not isinstance(variables, dict):
            raise DataError(f"{where}: {TEMPLATE_COLUMN!r} must be a JSON object, got {variables!r:.80}")
        taken = sorted(_RESERVED & variables.keys())
        if taken:
            raise DataError(
                f"{where}: {TEMPLATE_COLUMN!r} sets {taken[0]!r}, which is not a variable of the data; remove it"
            )
        options[TEMPLATE_COLUMN] = {name: value for name, value in variables.items() if value is not None}
    if not any(options.values()):
        return messages
    extra = {**_extra(messages[0]), "conversation": options}
    first: Message = {**messages[0], "extra": _json(extra, where, ", ".join(options))}
    return [first, *messages[1:]]


def check_variables(variables: dict[str, Any]) -> dict[str, Any]:
    """Variables of a chat template that the settings of a run name.

    Raises:
        ValueError: one of them is no variable of the data, or its value is not JSON.
    """
    taken = sorted(_RESERVED & variables.keys())
    if taken:
        raise ValueError(f"{taken[0]!r} is not a variable of the data; remove it")
    try:
        json.dumps(variables, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise ValueError(f"{variables!r:.80} is not JSON; dates and the like are text in quotes") from None
    return variables


def _check_all_read(row: dict[str, Any], where: str, ignored: Collection[str]) -> None:
    """Refuses columns that are a part of the prompt, and cannot be read as one."""
    unread = dict.fromkeys(_SENSES, "cannot be used, only text;") | _PARTS
    for column, why in unread.items():
        if column not in ignored and not _is_nothing(row.get(column)):
            raise DataError(f"{where}: {column!r} {why} leave it out with data.ignored_keys=[{column}]")


def _with_system(messages: list[Message], system: Any, where: str, column: str) -> list[Message]:
    if system is None or (isinstance(system, str) and not system.strip()):
        return messages
    if not isinstance(system, str):
        raise DataError(
            f"{where}: the column {column!r} beside the prompt must be text, its system turn, got {system!r:.80}; "
            f"rename it, or leave it out with data.ignored_keys=[{column}]"
        )
    first = messages[0]
    if first["role"] not in ("system", "developer"):
        return [{"role": "system", "content": system}, *messages]
    if first["content"] == system:
        return messages
    raise DataError(
        f"{where}: the column {column!r} and the prompt's own system turn differ; remove one of them, or leave the "
        f"column out with data.ignored_keys=[{column}]"
    )


def _decoded(value: Any, where: str, column: str) -> Any:
    """The value of a column that may hold its JSON as text."""
    if not isinstance(value, str) or not value.strip():
        return None if isinstance(value, str) else value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise DataError(f"{where}: {column!r} is text, but not JSON: {value!r:.60}") from None
