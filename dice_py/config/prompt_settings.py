"""What the settings of a run say of every prompt: a system turn, tools, and variables of the chat template.

They are written into the messages when prompts and pairs are read, so that sampling, offline pairs and evaluation see
the same, and the keys of what was read have them. What a row says itself wins.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.config.run import RunConfig
from dice_py.data import Message, pairs_frame, prompt_key, prompts_frame
from dice_py.errors import DataError
from dice_py.rows.messages import TEMPLATE_COLUMN, TOOLS_COLUMN, options_of

_SYSTEM_ROLES = ("system", "developer")


@dataclass(frozen=True)
class PromptSettings:
    """`data.system_prompt`, `data.tools` and `model.chat_template_kwargs`; false where none of them is set."""

    system: str | None = None
    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(config: RunConfig) -> PromptSettings:
        """Those of a config.

        Raises:
            DataError: the file of data.tools cannot be read.
        """
        tools = config.data.tools
        return PromptSettings(
            config.data.system_prompt,
            _read_tools(Path(tools)) if isinstance(tools, str) else tools,
            config.model.chat_template_kwargs,
        )

    def __bool__(self) -> bool:
        return bool(self.system or self.tools or self.variables)

    def key_fields(self) -> list[Any]:
        """All of it, for a key; empty where nothing is set."""
        return [[self.system, self.tools, self.variables]] if self else []

    def complete(self, prompt: list[Message]) -> list[Message]:
        """A prompt with what it does not say itself."""
        own = options_of(prompt)
        options = {TOOLS_COLUMN: self.tools, **own, TEMPLATE_COLUMN: self.variables | own.get(TEMPLATE_COLUMN, {})}
        first, *others = prompt
        if self.system and first["role"] not in _SYSTEM_ROLES:
            others = [_with_options(first, {}), *others]
            first = {"role": "system", "content": self.system}
        return [_with_options(first, {name: value for name, value in options.items() if value}), *others]

    def of_prompts(self, prompts: pl.DataFrame) -> pl.DataFrame:
        """The frame of `read_prompts` with complete prompts, each once."""
        if not self:
            return prompts
        completed = [self.complete(messages) for messages in prompts["messages"].to_list()]
        frame = prompts_frame(completed).with_columns(prompts.drop("messages"))
        keys = pl.Series([prompt_key(messages) for messages in completed], dtype=pl.String)
        return frame.filter(keys.is_first_distinct())

    def of_pairs(self, pairs: pl.DataFrame) -> pl.DataFrame:
        """The frame of `read_pairs` with complete prompts."""
        if not self:
            return pairs
        rows = pairs.select("prompt", "chosen", "rejected").to_dicts()
        completed = pairs_frame([{**row, "prompt": self.complete(row["prompt"])} for row in rows])  # type: ignore[typeddict-item]
        return completed.with_columns(pairs.drop(completed.columns))

    def of_rows(self, rows: pl.DataFrame, column: str = "prompt") -> pl.DataFrame:
        """Any rows with complete prompts in a column of messages."""
        if not self:
            return rows
        completed = prompts_frame([self.complete(messages) for messages in rows[column].to_list()])
        return rows.with_columns(completed["messages"].alias(column))


def _with_options(message: Message, options: dict[str, Any]) -> Message:
    """A turn with the options of its conversation, and with its own fields."""
    extra = json.loads(message.get("extra") or "{}")
    extra = {name: value for name, value in extra.items() if name != "conversation"}
    if options:
        extra["conversation"] = options
    bare: Message = {"role": message["role"], "content": message["content"]}
    return {**bare, "extra": json.dumps(extra, ensure_ascii=False)} if extra else bare


def _read_tools(file: Path) -> list[dict[str, Any]]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"data.tools: {file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"data.tools: {file} is not JSON ({error}); it must hold a list of tools") from None
    tools = [value] if isinstance(value, dict) else value
    if not isinstance(tools, list) or not tools or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"data.tools: {file} must hold a list of tools (JSON objects), got {value!r:.80}")
    return tools
