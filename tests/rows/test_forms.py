"""The forms that published data has: other columns, transcripts, ShareGPT's messages, training data, scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from notes import Notes

from dice_py.data import read_pairs, read_prompts, read_responses
from dice_py.errors import DataError


def turns(*contents: str, first: str = "user") -> list[dict[str, str]]:
    """Turns of the user and the assistant by turns."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]


def sharegpt(*contents: str, names: tuple[str, str] = ("human", "gpt")) -> list[dict[str, str]]:
    return [{"from": names[n % 2], "value": content} for n, content in enumerate(contents)]


def transcript(*contents: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[n % 2]}: {content}" for n, content in enumerate(contents))


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


THREE = ("hi", "hello", "two?", "2", "sure?")
"""A prompt of three turns of the user."""
PROMPT = turns(*THREE)
PAIRS: dict[str, dict[str, Any]] = {
    "messages": {"prompt": PROMPT, "chosen": "yes", "rejected": "no"},
    "conversations": {"chosen": turns(*THREE, "yes"), "rejected": turns(*THREE, "no")},
    "hh-rlhf": {"chosen": transcript(*THREE, "yes"), "rejected": transcript(*THREE, "no")},
    "null prompt": {"prompt": None, "chosen": transcript(*THREE, "yes"), "rejected": transcript(*THREE, "no")},
    "sharegpt": {"chosen": sharegpt(*THREE, "yes"), "rejected": sharegpt(*THREE, "no")},
    "LLaMA-Factory": {
        "conversations": sharegpt(*THREE),
        "chosen": {"from": "gpt", "value": "yes"},
        "rejected": {"from": "gpt", "value": "no"},
    },
    "messages beside answers": {"messages": turns(*THREE), "chosen": "yes", "rejected": "no"},
    "training data beside answers": {"messages": turns(*THREE, "yes"), "chosen": "yes", "rejected": "no"},
    "JSON text": {
        "conversations": json.dumps(sharegpt(*THREE)),
        "chosen": json.dumps(sharegpt("yes", names=("gpt", "human"))),
        "rejected": json.dumps(turns("no", first="assistant")),
    },
}


@pytest.mark.parametrize("form", PAIRS)
def test_pairs_on_a_prompt_of_three_turns(form: str, file: Path) -> None:
    write(file, PAIRS[form])
    (row,) = read_pairs(file).select("prompt", "chosen", "rejected").rows()
    assert row == (PROMPT, turns("yes", first="assistant"), turns("no", first="assistant"))
    assert read_prompts(file)["messages"].to_list() == [PROMPT]  # so that pairs and prompts can be told apart by it


@pytest.mark.parametrize(
    ("row", "prompt", "note"),
    [
        ({"instruction": "a"}, turns("a"), "the prompt is 'instruction' (1 row)"),
        ({"question": "a", "messages": turns("b")}, turns("a"), "the prompt is 'question' (1 row)"),
        ({"instruction": "a", "question": "b"}, turns("a"), "the prompt is 'instruction' (1 row)"),
        ({"messages": turns("a", "b", "c")}, turns("a", "b", "c"), "the prompt is 'messages' (1 row)"),
        ({"conversations": sharegpt("a", "b", "c")}, turns("a", "b", "c"), "the prompt is 'conversations' (1 row)"),
        ({"prompt": sharegpt("a", "b", "c")}, turns("a", "b", "c"), None),
        (
            {"messages": turns("a", "b", "c", "d")},
            turns("a", "b", "c"),
            "'messages' ends with an answer, and the prompt is what stands before it (1 row)",
        ),
        (
            {"conversations": sharegpt("a", "b")},
            turns("a"),
            "'conversations' ends with an answer, and the prompt is what stands before it (1 row)",
        ),
        (
            {"instruction": "a", "input": "b", "output": "c"},
            turns("a\n\nb"),
            "the prompt is 'instruction', an empty line and 'input' (1 row)",
        ),
    ],
)
def test_prompts(row: dict[str, Any], prompt: list[Any], note: str | None, file: Path) -> None:
    log = Notes()
    assert read_prompts(write(file, row), report=log)["messages"].to_list() == [prompt]
    assert len(log.texts) == (note is not None)
    if note is not None:
        assert log.texts[0].startswith(f"{file}: no column 'prompt', so the prompt is '")
        assert note in log.texts[0]


def test_one_note_for_a_file_and_one_column(file: Path) -> None:
    """The first row decides: a row of the file that lacks its column is a mistake."""
    log = Notes()
    read_prompts(write(file, *({"question": f"q{n}"} for n in range(5))), report=log)
    assert log.texts == [f"{file}: no column 'prompt', so the prompt is 'question' (5 rows)"]
    with pytest.raises(DataError, match=r"line 2: no column 'prompt'; its columns are question\."):
        read_prompts(write(file, {"prompt": "a"}, {"question": "b"}))
    with pytest.raises(DataError, match=r"line 2: no column 'prompt'; its columns are instruction\."):
        read_prompts(write(file, {"question": "a"}, {"instruction": "b"}))


def test_a_column_that_was_named_is_taken_or_missed(file: Path) -> None:
    write(file, {"question": "a", "instruction": "b", "messages": turns("c", "d")})
    log = Notes()
    assert read_prompts(file, "question", report=log)["messages"].to_list() == [turns("a")]
    assert log.texts == []
    assert read_prompts(file, "messages", report=log)["messages"].to_list() == [turns("c")]
    assert "'messages' ends with an answer" in log.texts[0]
    with pytest.raises(DataError, match=r"no column 'text'; its columns are question, instruction, messages\. Name"):
        read_prompts(file, "text")


def test_where_a_turn_of_a_transcript_begins(file: Path) -> None:
    """Only after an empty line; what is said may name Human: and Assistant:."""
    said = "Write 'Human: hi'.\nHuman: in a line\nAssistant: too, and\n\nhuman: Human: here"
    row = {"chosen": transcript(said, "Assistant: yes"), "rejected": transcript(said, "no\n\n  Human: indented\n")}
    log = Notes()
    (pair,) = read_pairs(write(file, row), report=log).select("prompt", "chosen", "rejected").rows()
    assert pair == (
        turns(said),
        turns("Assistant: yes", first="assistant"),
        turns("no\n\n  Human: indented", first="assistant"),
    )
    assert log.texts == [
        f"{file}: 'chosen' and 'rejected' are transcripts, and read as the turns of Human and Assistant (1 row)"
    ]


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        (transcript("a", "b"), "b", "have no common beginning"),
        ("Say Human: hi", "Say Human: ho", "have no common beginning"),
        (transcript("a", "b"), transcript("c", "d"), "have no common beginning"),
        (transcript("a", "b", "c"), transcript("a", "b", "c"), "the prompt ends with an assistant turn"),
        (transcript("a", "b", "c", "d"), transcript("a", "b"), "'chosen' must be one assistant turn after the prompt"),
        (transcript("a", ""), transcript("a", "b"), "'chosen' is an empty text"),
    ],
)
def test_transcripts_that_are_no_pair(chosen: str, rejected: str, message: str, file: Path) -> None:
    write(
        file,
        {"chosen": transcript("a", "b"), "rejected": transcript("a", "c")},
        {"chosen": chosen, "rejected": rejected},
    )
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 2: .*{message}"):
        read_pairs(file)


def test_text_with_a_prompt_beside_it_is_no_transcript(file: Path) -> None:
    row = {"prompt": "a", "chosen": transcript("a", "b"), "rejected": transcript("a", "c")}
    (pair,) = read_pairs(write(file, row)).select("prompt", "chosen").rows()
    assert pair == (turns("a"), turns(transcript("a", "b"), first="assistant"))


def test_who_speaks_in_sharegpt(file: Path) -> None:
    names = ["system", "human", "gpt", "tool", "chatgpt", "user"]
    row = {"conversations": [{"from": name, "value": name, "weight": None} for name in names]}
    (messages,) = read_prompts(write(file, row))["messages"].to_list()
    assert [turn["role"] for turn in messages] == ["system", "user", "assistant", "tool", "assistant", "user"]
    for name in ("narrator", 3, None):
        with pytest.raises(
            DataError, match=rf"line 1: 'conversations' has a turn from {name!r}, which is none of human"
        ):
            read_prompts(write(file, {"conversations": [{"from": name, "value": "a"}]}))
    kept = {"from": "human", "value": "a", "name": "Ada"}
    (messages,) = read_prompts(write(file, {"conversations": [kept]}))["messages"].to_list()
    assert json.loads(messages[0]["extra"]) == {"message": {"name": "Ada"}}


def test_a_system_column_beside_other_forms(file: Path) -> None:
    """Orca's rows, and LLaMA-Factory's."""
    rows = {"question": "a", "chosen": "b", "rejected": "c"}, {"conversations": sharegpt("a"), **turn_pair()}
    for row in rows:
        (prompt,) = read_pairs(write(file, {**row, "system": "Be brief."}))["prompt"].to_list()
        assert prompt == [{"role": "system", "content": "Be brief."}, *turns("a")]


def turn_pair() -> dict[str, Any]:
    return {"chosen": {"from": "gpt", "value": "b"}, "rejected": {"from": "gpt", "value": "c"}}


def test_scores_as_the_margin(file: Path) -> None:
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    scored = {**pair, "score_chosen": 8.5, "score_rejected": 6}
    log = Notes()
    assert read_pairs(write(file, scored, scored), margin_column="margin", report=log)["margin"].to_list() == [2.5, 2.5]
    assert log.texts == [f"{file}: no column 'margin', so it is 'score_chosen' − 'score_rejected' (2 rows)"]
    log = Notes()
    assert "margin" not in read_pairs(file, report=log).columns  # it is read only where it is asked for
    assert log.texts == []
    assert read_pairs(write(file, {**scored, "margin": 1}), margin_column="margin")["margin"].to_list() == [1.0]
    with pytest.raises(DataError, match="no column 'm'; its columns are prompt, chosen, rejected, score_chosen"):
        read_pairs(file, margin_column="m")
    with pytest.raises(DataError, match="'score_rejected' must be a finite number, got 'bad'"):
        read_pairs(write(file, {**scored, "score_rejected": "bad"}), margin_column="margin")
    with pytest.raises(DataError, match="no column 'margin'"):
        read_pairs(write(file, {**pair, "score_chosen": 1}), margin_column="margin")


def test_responses_to_prompts_of_other_forms(file: Path) -> None:
    log = Notes()
    rows = read_responses(write(file, {"question": "a", "response": "b"}), report=log)
    assert (rows["messages"].to_list(), rows["response"].to_list()) == ([turns("a")], ["b"])
    assert log.texts == [f"{file}: no column 'prompt', so the prompt is 'question' (1 row)"]
    rows = read_responses(write(file, {"instruction": "a", "output": "b", "generator": "g"}))  # AlpacaEval's
    assert rows["messages"].to_list() == [turns("a")]
