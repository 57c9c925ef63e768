"""What a user's rows say beside role and content: kept in every form that files have it in, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from dice_py.data import pairs_frame, prompts_frame, read_pairs, read_prompts
from dice_py.errors import DataError
from dice_py.rows.messages import fields_of, options_of, prompt_key
from dice_py.storage.parquet import read_parquet, write_parquet
from dice_py.storage.schemas import MESSAGES, MESSAGES_WITH_EXTRA, PROMPTS

CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
TURNS = [
    {"role": "user", "content": "Is it cold in Oslo?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "I must ask."},
    {"role": "tool", "content": "-3 C", "tool_call_id": "a1", "name": "get_weather"},
]


def jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def first(path: Path, **options: Any) -> list[Any]:
    messages: list[Any] = read_prompts(path, **options)["messages"].to_list()[0]
    return messages


def test_every_field_of_a_turn_is_kept(tmp_path: Path) -> None:
    messages = first(jsonl(tmp_path / "p.jsonl", {"prompt": TURNS}))
    assert [fields_of(message) for message in messages] == [TURNS[0], {**TURNS[1], "content": ""}, TURNS[2]]
    # As Parquet, whose rows have every field of every other row, as null.
    pl.DataFrame({"prompt": [TURNS, [{"role": "user", "content": "hi", "name": ""}]]}).write_parquet(
        tmp_path / "p.parquet"
    )
    prompts = read_prompts(tmp_path / "p.parquet")["messages"].to_list()
    assert [fields_of(message) for message in prompts[0]] == [TURNS[0], {**TURNS[1], "content": ""}, TURNS[2]]
    assert [fields_of(message) for message in prompts[1]] == [{"role": "user", "content": "hi"}]


def test_artifacts_keep_the_fields_and_plain_ones_stay_as_they_were(tmp_path: Path) -> None:
    rich = read_prompts(jsonl(tmp_path / "p.jsonl", {"prompt": TURNS}, {"prompt": "hi"}))
    file = write_parquet(tmp_path / "prompts.parquet", rich, key="k", schema=PROMPTS)
    assert read_parquet(file).schema["messages"] == MESSAGES_WITH_EXTRA
    assert read_parquet(file)["messages"].to_list() == rich["messages"].to_list()
    plain = prompts_frame([[{"role": "user", "content": "hi"}]])
    assert plain.schema["messages"] == MESSAGES
    both = pl.concat([rich.select(PROMPTS.names()), plain], how="vertical_relaxed")
    assert fields_of(both["messages"].to_list()[0][1])["tool_calls"] == [CALL]


def test_the_key_of_a_prompt_tells_its_fields_and_tools_apart(tmp_path: Path) -> None:
    bare = [{"role": turn["role"], "content": turn["content"] or ""} for turn in TURNS]
    path = jsonl(
        tmp_path / "p.jsonl", {"prompt": TURNS}, {"prompt": bare}, {"prompt": bare, "tools": [TOOL]}, {"prompt": TURNS}
    )
    messages = read_prompts(path)["messages"].to_list()
    assert len({prompt_key(one) for one in messages}) == len(messages) == 3
    assert prompt_key(messages[1]) == prompt_key(bare)  # with an extra of None, which Parquet gives to all


@pytest.mark.parametrize("tools", [[TOOL], TOOL, json.dumps([TOOL])], ids=["list", "one", "JSON text"])
def test_tools_and_variables_of_the_template(tmp_path: Path, tools: Any) -> None:
    row = {"prompt": "hi", "tools": tools, "chat_template_kwargs": {"enable_thinking": False, "other": None}}
    options = options_of(first(jsonl(tmp_path / "p.jsonl", row)))
    assert options == {"tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}}
    assert options_of(first(tmp_path / "p.jsonl", ignored=["tools", "chat_template_kwargs"])) == {}
    pair = {"prompt": "hi", "chosen": "a", "rejected": "b", "tools": tools}
    pairs = read_pairs(jsonl(tmp_path / "q.jsonl", pair))
    assert options_of(pairs["prompt"].to_list()[0]) == {"tools": [TOOL]}


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_column_is_the_system_turn(tmp_path: Path, column: str) -> None:
    system = {"role": "system", "content": "Be brief."}
    pair = {"prompt": "hi", "chosen": "a", "rejected": "b", column: "Be brief."}
    pairs = read_pairs(jsonl(tmp_path / "q.jsonl", pair, {**pair, column: ""}))
    assert pairs["prompt"].to_list()[0][0] == system
    assert len(pairs["prompt"].to_list()[1]) == 1  # an empty one is none
    user = {"role": "user", "content": "hi"}
    assert first(jsonl(tmp_path / "p.jsonl", {"prompt": [system, user], column: "Be brief."})) == [system, user]
    with pytest.raises(DataError, match=f"line 1: the column '{column}' and the prompt's own system turn differ"):
        read_prompts(jsonl(tmp_path / "p.jsonl", {"prompt": [system, user], column: "Be long."}))
    with pytest.raises(DataError, match=f"the column '{column}' beside the prompt must be text"):
        read_prompts(jsonl(tmp_path / "p.jsonl", {"prompt": "hi", column: 3}))
    assert first(tmp_path / "p.jsonl", ignored=[column]) == [user]
    assert first(jsonl(tmp_path / "p.jsonl", {column: "hi"}), column=column) == [user]  # it is the prompt itself


def test_messages_as_json_text(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}]
    answers = {side: json.dumps([{"role": "assistant", "content": side}]) for side in ("chosen", "rejected")}
    pairs = read_pairs(jsonl(tmp_path / "q.jsonl", {"prompt": json.dumps(turns), **answers}))
    assert pairs["prompt"].to_list() == [turns]
    assert pairs["chosen"].to_list() == [[{"role": "assistant", "content": "chosen"}]]
    for value in (turns[0], {"messages": turns}):
        assert first(jsonl(tmp_path / "p.jsonl", {"prompt": json.dumps(value)})) == turns
        assert first(jsonl(tmp_path / "p.jsonl", {"prompt": json.dumps(json.dumps(value))})) == turns
        assert first(jsonl(tmp_path / "p.jsonl", {"prompt": value})) == turns
    with pytest.raises(DataError, match=r"line 1: 'prompt' is a list of messages written as Python text"):
        read_prompts(jsonl(tmp_path / "p.jsonl", {"prompt": str(turns)}))
    for text in (
        "[1, 2]",
        '{"a": 1}',
        "[Sum] what?",
        '"[1, 2]"',
        '"[Sum]" is what?',
        '[{"id": 1}, {"id": 2}]',
        "[" * 100_000,
    ):
        assert first(jsonl(tmp_path / "p.jsonl", {"prompt": text})) == [{"role": "user", "content": text}]


def test_a_content_of_parts(tmp_path: Path) -> None:
    def content(*parts: Any) -> str:
        turn = {"role": "user", "content": list(parts)}
        return str(first(jsonl(tmp_path / "p.jsonl", {"prompt": [turn]}))[0]["content"])

    assert content({"type": "text", "text": "What is "}, {"type": "text", "text": "two?"}) == "What is two?"
    assert content("What?") == "What?"
    with pytest.raises(DataError, match=r"line 1: .*a part 'image_url'; only parts of text"):
        content({"type": "text", "text": "See"}, {"type": "image_url", "image_url": {"url": "x"}})
    with pytest.raises(DataError, match="has the key 'citations', which cannot be rendered"):
        content({"type": "text", "text": "See", "citations": [1]})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tools": "get_weather"}, "'tools' is text, but not JSON"),
        ({"tools": ["get_weather"]}, "'tools' must be a list of JSON objects"),
        ({"images": ["a.png"]}, "'images' cannot be used, only text; leave it out with data.ignored_keys=.images."),
        ({"video": "a.mp4"}, "'video' cannot be used, only text"),
        (
            {"history": [["a", "b"]]},
            "'history' beside the prompt holds earlier turns, which .*, or leave",
        ),
        ({"functions": [{"name": "f"}]}, "'functions' is not read: rename it to tools"),
        ({"documents": [{"text": "a"}]}, "'documents' is not read"),
        ({"chat_template_kwargs": [1]}, "'chat_template_kwargs' must be a JSON object"),
        (
            {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
            "sets 'chat_template', which is not a variable of the data",
        ),
    ],
)
def test_columns_that_cannot_be_used(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_prompts(jsonl(tmp_path / "p.jsonl", {"prompt": "hi", **row}))


def test_columns_that_say_nothing_are_no_error(tmp_path: Path) -> None:
    empty = {"images": None, "history": [], "functions": "", "documents": None, "input": "of another column"}
    path = jsonl(tmp_path / "p.jsonl", {"prompt": "hi", **empty}, {"prompt": "hello", **empty, "history": [["a", "b"]]})
    assert first(path, ignored=["history"]) == [{"role": "user", "content": "hi"}]


def test_the_input_of_an_instruction(tmp_path: Path) -> None:
    """As Alpaca's rows have it: the prompt is both."""
    row = {"instruction": "Translate.", "input": "Hallo"}
    both, one = ([{"role": "user", "content": text}] for text in ("Translate.\n\nHallo", "Translate."))
    path = jsonl(tmp_path / "p.jsonl", row)
    assert first(path) == first(path, column="instruction") == both
    assert first(path, ignored=["input"]) == one
    assert first(jsonl(tmp_path / "p.jsonl", {**row, "input": ""}), column="instruction") == one
    for bad in ({**row, "input": 3}, {**row, "instruction": [{"role": "user", "content": "a"}] * 2}):
        with pytest.raises(
            DataError, match="'input' belongs to the instruction, and both must be text: write them into"
        ):
            read_prompts(jsonl(tmp_path / "p.jsonl", bad))


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_an_empty_turn_is_no_answer(tmp_path: Path, side: str) -> None:
    pair = {"prompt": "hi", "chosen": "a", "rejected": "b"}
    for content in ("", " \n"):
        turn = [{"role": "assistant", "content": content}]
        with pytest.raises(DataError, match=rf"q.jsonl, line 2: '{side}' is an empty text"):
            read_pairs(jsonl(tmp_path / "q.jsonl", pair, {**pair, side: turn}))
    call = [{"role": "assistant", "content": "", "tool_calls": [CALL]}]
    assert read_pairs(jsonl(tmp_path / "q.jsonl", {**pair, side: call})).height == 1


def test_pairs_that_differ_in_a_field_alone_are_no_equal_pairs(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    other = {**call, "tool_calls": [{**CALL, "type": "other"}]}
    row = {"prompt": "hi", "chosen": [call], "rejected": [other]}
    assert read_pairs(jsonl(tmp_path / "q.jsonl", row)).height == 1
    assert pairs_frame([]).is_empty()
