"""A user's prompts and pairs: every format of TRL's, and every way in which a file can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from dice_py.data import prompt_key, read_pairs, read_prompts
from dice_py.errors import DataError
from dice_py.storage.schemas import MESSAGES, PLACE, PROMPTS_READ

Rows = list[dict[str, Any]]
KINDS = ("jsonl", "json", "parquet")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write_rows(rows: Rows, kind: str = "jsonl") -> Path:
        path = tmp_path / f"rows.{kind}"
        if kind == "parquet":
            pl.DataFrame(rows).write_parquet(path)
        elif kind == "json":
            path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write_rows


def refused(read: Callable[..., Any], *args: Any, **options: Any) -> str:
    """The message of the error that reading raises."""
    with pytest.raises(DataError) as caught:
        read(*args, **options)
    assert caught.value.exit_code == 3
    return str(caught.value)


# --- prompts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_as_text_and_as_messages(write, kind: str) -> None:
    texts = read_prompts(write([{"prompt": "What is two?"}, {"prompt": "And three? 三"}], kind))
    assert texts.schema == PROMPTS_READ
    first = {"jsonl": "line 1", "json": "item 0", "parquet": "row 0"}[kind]
    assert texts[PLACE][0] == f"rows.{kind}, {first}"
    assert texts.drop(PLACE).rows() == [(0, [user("What is two?")]), (1, [user("And three? 三")])]
    turns = [system("Be brief."), user("What is two?"), assistant("2"), user("Sure?")]
    # A message's other fields (a name, a tool call that is none) are not part of the prompt.
    rows = [{"prompt": [{**turn, "name": None} for turn in turns]}]
    assert read_prompts(write(rows, kind)).drop(PLACE).rows() == [(0, turns)]


def test_prompts_from_other_columns(write) -> None:
    path = write([{"question": "What is two?", "id": 7}])
    assert read_prompts(path, "question")["messages"].to_list() == [[user("What is two?")]]
    assert read_prompts(write([{"messages": [user("hi")]}]))["messages"].to_list() == [[user("hi")]]
    pairs = [{"chosen": [user("hi"), assistant("a")], "rejected": [user("hi"), assistant("b")]}]
    assert read_prompts(write(pairs))["messages"].to_list() == [[user("hi")]]


def test_equal_prompts_count_once_and_ids_follow_the_file(write) -> None:
    rows = [{"prompt": text} for text in ("b", "a", "b", "c", "a")]
    prompts = read_prompts(write(rows))
    assert prompts["prompt_id"].to_list() == [0, 1, 2]
    assert [messages[0]["content"] for messages in prompts["messages"].to_list()] == ["b", "a", "c"]


def test_line_ends_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}')
    assert read_prompts(path).height == 2
    # U+2028 ends no line of JSONL.
    path.write_text('{"prompt": "a\u2028b"}\n', encoding="utf-8")
    assert read_prompts(path)["messages"].to_list() == [[user("a\u2028b")]]


def test_a_parquet_file_named_like_a_pattern(tmp_path: Path) -> None:
    path = tmp_path / "part[0]*.parquet"
    pl.DataFrame({"prompt": ["hi"]}).write_parquet(path)
    assert read_prompts(path).height == 1


def test_prompt_key_tells_turns_apart() -> None:
    assert prompt_key([user("a"), user("b")]) != prompt_key([user("a b")])
    assert prompt_key([user("a")]) != prompt_key([system("a")])
    assert prompt_key([user("a")]) == prompt_key([{"content": "a", "role": "user"}])


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_column_lists_the_columns_and_names_the_option(write, kind: str) -> None:
    path = write([{"text": "hi", "topic": "none"}], kind)
    message = refused(read_prompts, path)
    where = {"jsonl": "line 1", "json": "item 0", "parquet": "row 0"}[kind]
    assert message.startswith(f"{path}, {where}: no column 'prompt'; its columns are text, topic.")
    assert "--prompt-column" in message
    assert "data.prompt_column" in message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', "not valid JSON (Expecting ',' delimiter at column 15); fix or remove it"),
        ("prompt", "not valid JSON (Expecting value at column 1)"),
        ('["a"]', "expected a JSON object, not a list"),
        ('"a"', "expected a JSON object, not a str"),
        ('{"prompt": ""}', "'prompt' is an empty text"),
        ('{"prompt": null}', "'prompt' must be text or a non-empty list of messages, got None"),
        ('{"prompt": []}', "'prompt' must be text or a non-empty list of messages, got []"),
        ('{"prompt": 5}', "'prompt' must be text or a non-empty list of messages, got 5"),
        ('{"prompt": ["a"]}', "'prompt' holds 'a', not a message with role and content as text"),
        ('{"prompt": [{"role": "user"}]}', "not a message with role and content as text"),
        ('{"prompt": [{"role": "user", "content": [{"type": "text"}]}]}', "has a part 'text'; only parts of text"),
        ('{"prompt": " \\n"}', "'prompt' is an empty text"),
        ('{"prompt": [{"role": "user", "content": " "}]}', "every user turn of 'prompt' is empty"),
        ('{"prompt": [{"role": "system", "content": "a"}]}', "no user turn; its roles are ['system']"),
        (
            '{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            "the prompt ends with an assistant turn; it must end where the response begins",
        ),
        ('{"prompt": "a\\ud83d"}', "holds half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "good"}\n\n' + line + '\n{"prompt": "good too"}\n', encoding="utf-8")
    error = refused(read_prompts, path)
    assert error.startswith(f"{path}, line 3: ")
    assert message in error


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xe9"}\n')
    assert refused(read_prompts, path).startswith(f"{path}, line 2: not UTF-8 text (")


def test_json_files_that_are_no_list(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{"prompt": "a"}', encoding="utf-8")
    assert "must hold one list of objects; one object per line is .jsonl" in refused(read_prompts, path)
    path.write_text('[{"prompt": "a"},\n 5]', encoding="utf-8")
    assert f"{path}, item 1: expected a JSON object, not a int" in refused(read_prompts, path)
    path.write_text('[{"prompt": "a"},\n x]', encoding="utf-8")
    assert f"{path}: not valid JSON (Expecting value at line 2, column 2)" in refused(read_prompts, path)
    path.write_text("[" * 100_000, encoding="utf-8")
    assert "nested too deeply" in refused(read_prompts, path)


@pytest.mark.parametrize("read", [read_prompts, read_pairs])
def test_files_without_rows(tmp_path: Path, read: Callable[..., Any]) -> None:
    assert refused(read, tmp_path / "absent.jsonl") == f"{tmp_path / 'absent.jsonl'} does not exist (or is not a file)"
    assert refused(read, tmp_path) == f"{tmp_path} is a folder without a file of .jsonl, .json, .parquet, .csv or .tsv"
    for kind in KINDS:
        path = tmp_path / f"empty.{kind}"
        path.touch()
        assert refused(read, path) == f"{path} is empty"
    (tmp_path / "blank.jsonl").write_text("\n  \n")
    (tmp_path / "blank.json").write_text("[]")
    pl.DataFrame(schema={"prompt": pl.String}).write_parquet(tmp_path / "blank.parquet")
    for kind in KINDS:
        path = tmp_path / f"blank.{kind}"
        assert refused(read, path).startswith(f"{path} holds no p")
    path = tmp_path / "rows.txt"
    path.write_text("prompt\na\n")
    assert refused(read, path).startswith(
        f"{path}: unknown file type '.txt'; use .jsonl, .json, .parquet, .csv or .tsv"
    )


def test_parquet_that_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_text("these bytes are no Parquet file, but there are enough of them\n" * 10)
    assert f"{path} cannot be read as Parquet" in refused(read_prompts, path)
    pl.DataFrame({"prompt": [f"prompt {i}" for i in range(1000)]}).write_parquet(path)
    path.write_bytes(path.read_bytes()[:-200])  # a copy that was cut off
    assert f"{path} cannot be read as Parquet" in refused(read_prompts, path)


# --- pairs -------------------------------------------------------------------------------------------------

PROMPT = [system("Be brief."), user("What is two?")]
FORMS: dict[str, dict[str, Any]] = {
    "text": {"prompt": "What is two?", "chosen": "2", "rejected": "3"},
    "messages": {"prompt": PROMPT, "chosen": [assistant("2")], "rejected": [assistant("3")]},
    "messages, answers as text": {"prompt": PROMPT, "chosen": "2", "rejected": "3"},
    "implicit prompt": {"chosen": [*PROMPT, assistant("2")], "rejected": [*PROMPT, assistant("3")]},
    "prompt given and repeated": {
        "prompt": PROMPT,
        "chosen": [*PROMPT, assistant("2")],
        "rejected": [*PROMPT, assistant("3")],
    },
    # As in published datasets: the prompt as text, and full conversations as messages.
    "prompt as text and repeated": {
        "prompt": "What is two?",
        "chosen": [user("What is two?"), assistant("2")],
        "rejected": [user("What is two?"), assistant("3")],
    },
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_pairs_in_every_form(write, kind: str, form: str) -> None:
    pairs = read_pairs(write([FORMS[form], FORMS[form]], kind)).drop(PLACE)
    prompt = [user("What is two?")] if "text" in form and "answers" not in form else PROMPT
    expected = (prompt, [assistant("2")], [assistant("3")], prompt_key(prompt))
    assert pairs.rows() == [expected, expected]
    assert dict(pairs.schema) == {
        "prompt": MESSAGES,
        "chosen": MESSAGES,
        "rejected": MESSAGES,
        "key": pl.String,
    }


def test_pairs_of_one_answer_after_several_turns(write) -> None:
    shared = [user("hi"), assistant("hello"), user("What is two?")]
    row = {"chosen": [*shared, assistant("2")], "rejected": [*shared, assistant("3")]}
    assert read_pairs(write([row]))["prompt"].to_list() == [shared]


def test_pairs_from_other_columns(write) -> None:
    path = write([{"q": "What is two?", "good": "2", "bad": "3"}])
    pairs = read_pairs(path, prompt_column="q", chosen_column="good", rejected_column="bad")
    assert pairs["chosen"].to_list() == [[assistant("2")]]


def test_pairs_that_say_nothing_are_left_out(write) -> None:
    same = {"prompt": "What is two?", "chosen": "2", "rejected": "2"}
    implicit = {"chosen": [user("hi"), assistant("2")], "rejected": [user("hi"), assistant("2")]}
    for nothing in (same, implicit):
        assert read_pairs(write([nothing, FORMS["text"]]))["chosen"].to_list() == [[assistant("2")]]
    path = write([same])
    assert refused(read_pairs, path) == f"{path} holds no pairs (or only pairs whose chosen equals their rejected)"


def test_weights(write) -> None:
    same = {"prompt": "What is two?", "chosen": "2", "rejected": "2", "w": 5}
    rows = [{**FORMS["text"], "w": 0}, same, {**FORMS["text"], "w": 1.5}]
    pairs = read_pairs(write(rows), weight_column="w")
    assert pairs["weight"].to_list() == [0.0, 1.5]  # the weight of a pair that is left out goes with it
    assert pairs["weight"].dtype == pl.Float64
    for bad in (-1, None, "1", True, float("nan"), float("inf")):
        path = write([FORMS["text"] | {"w": 1}, FORMS["text"] | {"w": bad}])
        message = refused(read_pairs, path, weight_column="w")
        assert message.startswith(f"{path}, line 2: 'w' must be a finite number ≥ 0, got {bad!r}; ")
    message = refused(read_pairs, write([FORMS["text"]]), weight_column="w")
    assert "no column 'w'; its columns are prompt, chosen, rejected" in message
    assert "--weight-column" in message
    assert "data.weight_column" in message


def test_columns_for_the_replay_draw(write) -> None:
    same = {"prompt": "What is two?", "chosen": "2", "rejected": "2", "m": 5, "r": 5, "s": "x"}
    rows = [FORMS["text"] | {"m": -1, "r": 0, "s": "a"}, same, FORMS["text"] | {"m": 0.5, "r": 2, "s": "b"}]
    named = {"margin_column": "m", "round_column": "r", "source_column": "s"}
    pairs = read_pairs(write(rows), **named, current_round=2)  # the pair that is left out may be of round 5
    assert pairs.select("margin", "round", "source").rows() == [(-1.0, 0, "a"), (0.5, 2, "b")]
    assert pairs.schema["margin"] == pl.Float64
    assert pairs.schema["round"] == pl.Int64
    assert set(read_pairs(write(rows)).columns) == {"prompt", "chosen", "rejected", "key", PLACE}


@pytest.mark.parametrize(
    ("column", "bad", "message"),
    [
        ("margin", None, "'margin' must be a finite number, got None"),
        ("margin", float("nan"), "'margin' must be a finite number, got nan"),
        ("margin", float("-inf"), "'margin' must be a finite number, got -inf"),
        ("margin", 10**400, "'margin' must be a finite number, got 1000"),
        ("round", 1.5, "'round' must be a whole number, got 1.5"),
        ("round", True, "'round' must be a whole number, got True"),
        ("round", 2**63, "'round' must be a whole number, got 9223372036854775808"),
        ("round", 4, "'round' is 4, but the current round is 3: a pair's age cannot be negative"),
        ("source", None, "'source' must be text, got None"),
        ("source", 3, "'source' must be text, got 3"),
    ],
)
def test_a_bad_value_for_replay_sampling_is_named(write, column: str, bad: Any, message: str) -> None:
    fine = {"margin": 1.0, "round": 1, "source": "a"}[column]
    path = write([FORMS["text"] | {column: fine}, FORMS["text"] | {column: bad}])
    error = refused(read_pairs, path, **{f"{column}_column": column}, current_round=3)
    assert error.startswith(f"{path}, line 2: {message}")
    error = refused(read_pairs, write([FORMS["text"]]), **{f"{column}_column": column})
    assert f"no column {column!r}" in error
    assert f"--{column}-column (in a run: --set data.{column}_column=NAME)" in error


def test_the_weight_column_of_a_named_buffer(write) -> None:
    message = refused(
        read_pairs, write([FORMS["text"]]), weight_column="w", weight_key="replay.buffers.uf.weight_column"
    )
    assert "Name the right one with --set replay.buffers.uf.weight_column=NAME" in message


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a", "chosen": "b"},
            "no column 'rejected'; its columns are prompt, chosen. Name the right one",
        ),
        (
            {"prompt": "a", "rejected": "b"},
            "no column 'chosen'; its columns are prompt, rejected. Name the right one",
        ),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "'chosen' is an empty text"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "'rejected' must be text or a non-empty list"),
        (
            {"prompt": "a", "chosen": [user("b")], "rejected": "c"},
            "'chosen' must be one assistant turn after the prompt, got roles ['user']",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": [assistant("c"), user("d"), assistant("e")]},
            "'rejected' must be one assistant turn after the prompt, got roles ['assistant', 'user', ",
        ),
        (
            {"chosen": "b", "rejected": "c"},
            "no column 'prompt', and 'chosen' and 'rejected' have no common beginning; "
            "its columns are chosen, rejected",
        ),
        (
            {
                "chosen": [user("a"), assistant("b"), user("c")],
                "rejected": [user("a"), assistant("b"), user("d")],
            },
            "ends with an assistant turn",
        ),
        (
            {"prompt": [system("a")], "chosen": "b", "rejected": "c"},
            "the prompt has no user turn; its roles are ['system']",
        ),
    ],
)
def test_a_bad_pair_is_named(write, row: dict[str, Any], message: str) -> None:
    path = write([FORMS["text"], row])
    error = refused(read_pairs, path)
    assert error.startswith(f"{path}, line 2: ")
    assert message in error
