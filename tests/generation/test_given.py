"""Rows of responses that were sampled elsewhere: what is read, and what is refused by its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from notes import Notes

from dice_py.data import prompts_frame
from dice_py.errors import DataError
from dice_py.generation.given import GivenReading, read_given, read_given_prompts
from dice_py.rows.bad_rows import BadRowRule

PROMPTS = prompts_frame([[{"role": "user", "content": f"q{n}"}] for n in range(3)])


def read(
    tmp_path: Path, *rows: Any, held_out: tuple[str, ...] = (), **reading: Any
) -> tuple[pl.DataFrame, pl.DataFrame]:
    file = tmp_path / "given.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return read_given([file], PROMPTS, held_out, GivenReading(**reading), next_id=4)


def test_rows_and_lists_of_either_kind(tmp_path: Path) -> None:
    given, prompts = read(
        tmp_path,
        {"prompt_id": 2, "token_ids": [[5, 6], [7]], "logp": [-1.5, None], "finish_reason": ["stop", "length"]},
        {"prompt": "new?", "responses": ["a", "b"]},
        {"prompt": "q0", "response": [{"role": "assistant", "content": "one turn"}], "finish_reason": "eos"},
        {"prompt_id": 2, "response_token_ids": [8], "prompt_token_ids": [1, 2], "sampled_logp": -2},
    )
    assert given["prompt_id"].to_list() == [0, 2, 2, 2, 4, 4]
    assert given["token_ids"].to_list() == [None, [5, 6], [7], [8], None, None]
    assert given["response"].to_list() == ["one turn", None, None, None, "a", "b"]
    assert given["sampled_logp"].to_list() == [None, -1.5, None, -2.0, None, None]
    assert given["finish_reason"].to_list() == ["stop", "stop", "length", None, None, None]
    assert given["prompt_token_ids"].to_list() == [None, None, None, [1, 2], None, None]
    assert prompts["prompt_id"].to_list() == [0, 2, 4]
    assert [messages[0]["content"] for messages in prompts["messages"].to_list()] == ["q0", "q2", "new?"]


def test_held_out_prompts_are_left_out_and_counted(tmp_path: Path) -> None:
    notes = Notes()
    rows: list[Any] = [
        {"prompt_id": 0, "response": "a"},
        {"prompt_id": 3, "response": "b"},
        {"prompt": "q1", "response": "c"},
    ]
    key = '[["user", "q1"]]'
    given, _ = read(tmp_path, *rows, held_out=(key,), report=notes)
    assert given["response"].to_list() == ["a"]
    assert notes.texts == ["2 of the given responses are to held-out prompts: left out"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"response": "a"}, "no prompt: neither a column 'prompt' nor prompt_id"),
        ({"prompt_id": 4, "response": "a"}, "prompt_id is 4, which is no prompt of the run"),
        ({"prompt_id": True, "response": "a"}, "prompt_id is True"),
        ({"prompt": "q"}, "no response: neither 'response'"),
        ({"prompt": "q", "response": 3}, "must be text or a non-empty list of messages"),
        ({"prompt": "q", "response": []}, "'response' is an empty list"),
        ({"prompt": "q", "response": ["a", "b"], "logp": [-1.0]}, "'logp' must be a list of 2 values"),
        ({"prompt": "q", "response": ["a", "b"], "finish_reason": "stop"}, "must be a list of 2 values"),
        ({"prompt": "q", "token_ids": [1.5]}, "must be a list of token ids"),
        ({"prompt": "q", "token_ids": [-1]}, "must be a list of token ids"),
        ({"prompt": "q", "token_ids": []}, "'token_ids' is empty"),
        ({"prompt": "q", "response": "a", "logp": 0.5}, "not above 0; got 0.5"),
        ({"prompt": "q", "response": "a", "logp": "-1"}, "got '-1'"),
        ({"prompt": "q", "response": "a", "finish_reason": "abort"}, "finish_reason is 'abort'; write stop"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, row: Any, said: str) -> None:
    good = {"prompt": "q0", "response": "x"}
    with pytest.raises(DataError) as refused:
        read(tmp_path, good, row)
    assert str(refused.value).startswith(f"{tmp_path / 'given.jsonl'}, line 2: ")
    assert said in str(refused.value)
    notes = Notes()
    given, _ = read(tmp_path, good, row, rule=BadRowRule("skip", 0.5), report=notes)
    assert given.height == 1
    assert "line 2" in notes.texts[0]


def test_prompts_of_the_files_need_to_be_there(tmp_path: Path) -> None:
    file = tmp_path / "given.jsonl"
    file.write_text(
        '{"prompt": "a", "response": "b"}\n{"prompt": "a", "response": "c"}\n{"prompt_id": 0, "response": "d"}\n'
    )
    with pytest.raises(DataError, match=r"line 3: no column 'prompt'.*name that \(--prompts FILE\)"):
        read_given_prompts([file], GivenReading())
    notes = Notes()
    prompts = read_given_prompts([file], GivenReading(rule=BadRowRule("skip", 0.5), report=notes))
    assert [messages[0]["content"] for messages in prompts["messages"].to_list()] == ["a"]


def test_cells_of_a_csv_file_and_numbers_of_pandas(tmp_path: Path) -> None:
    file = tmp_path / "given.csv"
    file.write_text(
        "prompt_id,response,token_ids,sampled_logp,finish_reason\n"
        '1,7,,-2.5,stop\n2,,"[5, 6]",,\n0,"",,,length\n0,"[1]",,-1,\n'
    )
    given, _ = read_given([file], PROMPTS, (), GivenReading(), next_id=3)
    assert given.select("prompt_id", "response", "token_ids", "sampled_logp", "finish_reason").rows() == [
        (0, "", None, None, "length"),
        (0, "[1]", None, -1.0, None),
        (1, "7", None, -2.5, "stop"),
        (2, None, [5, 6], None, None),
    ]
    file.write_text("prompt_id,response\n1.5,a\n")
    with pytest.raises(DataError, match=r"line 2: prompt_id is 1\.5, which is no prompt of the run"):
        read_given([file], PROMPTS, (), GivenReading(), next_id=3)
    given, _ = read(tmp_path, {"prompt_id": 2.0, "response": "a"})
    assert given["prompt_id"].to_list() == [2]
