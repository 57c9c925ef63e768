"""What settings say of every prompt is in the messages that were read, and a row's own word wins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from dice_py.config.loading import resolve
from dice_py.config.prompt_settings import PromptSettings
from dice_py.data import read_pairs, read_prompts
from dice_py.errors import DataError, UsageError
from dice_py.rows.messages import fields_of, options_of

TOOL = {"type": "function", "function": {"name": "get_weather"}}
OTHER = {"type": "function", "function": {"name": "get_time"}}
SETTINGS = PromptSettings("Be brief.", [TOOL], {"enable_thinking": False, "mood": "dry"})


def read(tmp_path: Path, *rows: Any) -> pl.DataFrame:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return read_pairs(file) if "chosen" in rows[0] else read_prompts(file)


def test_prompts_are_complete_and_rows_win(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a"},
        {"prompt": "b", "system": "Be long.", "tools": [OTHER], "chat_template_kwargs": {"enable_thinking": True}},
        {"prompt": [{"role": "user", "content": "c", "name": "Ada"}]},
    ]
    frame = SETTINGS.of_prompts(read(tmp_path, *rows))
    assert frame["prompt_id"].to_list() == [0, 1, 2]
    assert frame["where"].str.starts_with("rows.jsonl, line").all()
    a, b, c = frame["messages"].to_list()
    assert [fields_of(turn) for turn in a] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
    ]
    assert options_of(a) == {"tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False, "mood": "dry"}}
    assert b[0]["content"] == "Be long."
    assert options_of(b) == {"tools": [OTHER], "chat_template_kwargs": {"enable_thinking": True, "mood": "dry"}}
    assert fields_of(c[1]) == {"role": "user", "content": "c", "name": "Ada"}
    assert options_of(c) == options_of(a)


def test_prompts_that_become_equal_are_kept_once(tmp_path: Path) -> None:
    frame = PromptSettings("Be brief.").of_prompts(
        read(tmp_path, {"prompt": "a"}, {"prompt": "b"}, {"prompt": "a", "system": "Be brief."})
    )
    assert frame["prompt_id"].to_list() == [0, 1]


def test_pairs_are_as_the_prompts(tmp_path: Path) -> None:
    prompts = SETTINGS.of_prompts(read(tmp_path, {"prompt": "a"}))
    pairs = SETTINGS.of_pairs(read(tmp_path, {"prompt": "a", "chosen": "x", "rejected": "y"}))
    assert pairs["prompt"].to_list() == prompts["messages"].to_list()
    assert pairs["chosen"].to_list()[0] == [{"role": "assistant", "content": "x"}]
    assert pairs["where"].to_list() == ["rows.jsonl, line 1"]
    plain = read(tmp_path, {"prompt": "a", "chosen": "x", "rejected": "y"})
    assert pairs["key"][0] != plain["key"][0]
    assert PromptSettings().of_pairs(plain) is plain


def test_tools_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "tools.json"
    config = resolve([], [f"data.tools={file}"], {}, one_stage=True)
    with pytest.raises(DataError, match=r"data.tools: .*tools.json cannot be read"):
        PromptSettings.of(config)
    for text, said in (
        ("[", "is not JSON"),
        ("[]", "must hold a list of tools"),
        ('["x"]', "must hold a list of tools"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=said):
            PromptSettings.of(config)
    file.write_text(json.dumps([TOOL]))
    assert PromptSettings.of(config).tools == [TOOL]


@pytest.mark.parametrize("value", ["{messages: [1]}", "{add_generation_prompt: true}"])
def test_variables_of_the_renderer_are_refused(value: str) -> None:
    with pytest.raises(UsageError, match="is not a variable of the data"):
        resolve([], [f"model.chat_template_kwargs={value}"], {}, one_stage=True)


def test_the_world_takes_none_of_them() -> None:
    with pytest.raises(UsageError, match=r"data.system_prompt given without model.policy"):
        resolve([], ["data.system_prompt=x"], {})
