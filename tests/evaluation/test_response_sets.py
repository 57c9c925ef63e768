"""Two sets of responses matched by prompt: the kinds of files, several responses a prompt, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from command_line import jsonl
from hypothesis import given
from hypothesis import strategies as st

from dice_py.config.prompt_settings import PromptSettings
from dice_py.data import prompts_frame
from dice_py.errors import DataError, UsageError
from dice_py.evaluation.response_sets import Matched, ResponseSet, match, prompt_text, read_response_set
from dice_py.rows.messages import prompt_key
from dice_py.storage.parquet import write_parquet
from dice_py.storage.schemas import PROMPTS

ROWS = [("one", "1"), ("two", "2"), ("one", "another 1"), ("three", "")]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def alpaca_file(folder: Path, name: str = "outputs") -> Path:
    rows = [{"instruction": p, "output": r, "generator": "model-x", "dataset": f"set of {p}"} for p, r in ROWS]
    file = folder / f"{name}.json"
    file.write_text(json.dumps(rows))
    return file


def generations(folder: Path) -> Path:
    """What `dice generate` writes, in two shards."""
    prompts = prompts_frame([user(text) for text in ("three", "one", "two")])  # type: ignore[misc]
    write_parquet(folder / "prompts.parquet", prompts, key="k", schema=PROMPTS)
    ids = {"three": 0, "one": 1, "two": 2}
    frame = pl.DataFrame({"prompt_id": [ids[p] for p, _ in ROWS], "response": [r for _, r in ROWS]})
    for number, part in enumerate((frame[:3], frame[3:])):
        write_parquet(folder / f"generations-{number:05}.parquet", part, key="k")
    return folder


def plain_files(folder: Path) -> dict[str, Path]:
    frame = pl.DataFrame({"prompt": [p for p, _ in ROWS], "response": [r for _, r in ROWS]})
    frame.write_parquet(folder / "plain.parquet")
    messages = [{"prompt": user(p), "response": [{"role": "assistant", "content": r}]} for p, r in ROWS]
    return {
        "jsonl": jsonl(folder / "plain.jsonl", *({"prompt": p, "response": r} for p, r in ROWS)),
        "messages": jsonl(folder / "messages.jsonl", *messages),
        "parquet": folder / "plain.parquet",
        "alpaca": alpaca_file(folder),
        "folder": generations(folder / "generated"),
    }


def shown(matched: Matched) -> list[tuple[str, str, str]]:
    texts = dict(matched.prompts.select("prompt_id", "messages").iter_rows())
    rows = zip(matched.ours["prompt_id"], matched.ours["response"], matched.theirs["response"], strict=True)
    return [(prompt_text(texts[prompt]), ours, theirs) for prompt, ours, theirs in rows]


@pytest.mark.parametrize("kind", ["jsonl", "messages", "parquet", "alpaca", "folder"])
def test_every_kind_of_file_is_the_same_set(kind: str, tmp_path: Path) -> None:
    file = plain_files(tmp_path)[kind]
    theirs = jsonl(tmp_path / "theirs.jsonl", *({"prompt": p, "response": f"their {r}"} for p, r in ROWS[::-1]))
    ours, others = read_response_set(file, "OURS", None), read_response_set(theirs, "THEIRS", None)
    matched = match(ours, others)
    assert ours.name == {"alpaca": "model-x", "folder": "generated"}.get(kind, file.stem)
    # The n-th response to a prompt beside the n-th, in the order of ours.
    assert shown(matched) == [
        ("one", "1", "their another 1"),
        ("two", "2", "their 2"),
        ("one", "another 1", "their 1"),
        ("three", "", "their "),
    ]
    assert matched.counts == {"only_ours": 0, "only_theirs": 0}
    assert matched.prompts.schema["prompt_id"] == pl.UInt32
    assert matched.prompts["dataset"][0] == ("set of one" if kind == "alpaca" else None)
    assert ("line 1" in matched.ours["where"][0]) == (kind in ("jsonl", "messages"))


def test_one_shard_alone(tmp_path: Path) -> None:
    folder = generations(tmp_path / "generated")
    found = read_response_set(folder / "generations-00001.parquet", "OURS", "name")
    assert (found.name, found.rows["response"].to_list()) == ("name", [""])


@given(
    ours=st.lists(st.tuples(st.integers(0, 3), st.text(max_size=3)), min_size=1, max_size=12),
    theirs=st.lists(st.tuples(st.integers(0, 3), st.text(max_size=3)), min_size=1, max_size=12),
)
def test_matching_is_that_of_a_loop(ours: list[tuple[int, str]], theirs: list[tuple[int, str]]) -> None:
    def of(name: str, rows: list[tuple[int, str]]) -> ResponseSet:
        prompts = [user(f"prompt {p}") for p, _ in rows]
        columns: dict[str, Any] = {
            "messages": prompts,
            "key": [prompt_key(prompt) for prompt in prompts],  # type: ignore[arg-type]
            "response": [text for _, text in rows],
            "dataset": [None] * len(rows),
            "where": [f"{name} {row}" for row in range(len(rows))],
        }
        return ResponseSet(name, pl.DataFrame(columns, schema_overrides={"dataset": pl.String}))

    expected = []
    for row, (prompt, text) in enumerate(ours):
        place = sum(other == prompt for other, _ in ours[:row])
        others = [other for at, other in theirs if at == prompt]
        if place < len(others):
            expected.append((f"prompt {prompt}", text, others[place]))
    if not expected:
        with pytest.raises(DataError, match="no prompt in common"):
            match(of("ours", ours), of("theirs", theirs))
        return
    matched = match(of("ours", ours), of("theirs", theirs))
    assert shown(matched) == expected
    assert matched.counts == {"only_ours": len(ours) - len(expected), "only_theirs": len(theirs) - len(expected)}


def test_a_system_turn_is_part_of_the_prompt(tmp_path: Path) -> None:
    one = jsonl(tmp_path / "one.jsonl", {"prompt": "hi", "response": "x"})
    other = jsonl(tmp_path / "other.jsonl", {"prompt": "hi", "response": "x", "system": "be brief"})
    with pytest.raises(DataError, match="no prompt in common"):
        match(read_response_set(one, "OURS", None), read_response_set(other, "THEIRS", None))
    assert prompt_text(read_response_set(other, "THEIRS", None).rows["messages"][0].to_list()) == (
        "system: be brief\n\nuser: hi"
    )


def test_two_sets_of_one_name(tmp_path: Path) -> None:
    file = plain_files(tmp_path)["jsonl"]
    with pytest.raises(UsageError, match=r"both .* named 'plain': give --ours-name and --theirs-name"):
        match(read_response_set(file, "OURS", None), read_response_set(file, "THEIRS", None))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "hi"}, r"line 1: no column 'response'.*--response-column"),
        ({"response": "x"}, r"line 1: no column 'prompt'.*--prompt-column"),
        ({"prompt": "hi", "response": None}, r"line 1: 'response' must be text"),
        ({"prompt": "hi", "response": 3}, r"line 1: 'response' must be text"),
        ({"prompt": "hi", "response": [{"role": "user", "content": "x"}]}, "one assistant turn"),
        ({"prompt": "", "response": "x"}, "'prompt' is an empty text"),
        ('{"prompt": "hi", "response": "\\ud800"}', "surrogate"),
        ('{"prompt": "hi", "response": "x", "response": "y"}', "twice"),
        ("", "holds no responses|is empty"),
    ],
)
def test_rows_that_cannot_be_used(row: Any, words: str, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "bad.jsonl", row)
    with pytest.raises(DataError, match=words):
        read_response_set(file, "OURS", None)


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"OURS: .* has no generations-\*\.parquet"):
        read_response_set(tmp_path, "OURS", None)
    folder = generations(tmp_path / "generated")
    write_parquet(folder / "prompts.parquet", prompts_frame([user("one")]), key="k", schema=PROMPTS)  # type: ignore[list-item]
    with pytest.raises(DataError, match=r"prompt_id 1, which .*prompts\.parquet does not have"):
        read_response_set(folder, "OURS", None)
    (folder / "prompts.parquet").unlink()
    with pytest.raises(DataError, match="keep them in one folder"):
        read_response_set(folder, "OURS", None)
    mixed = jsonl(
        tmp_path / "mixed.jsonl",
        *({"instruction": "hi", "output": "x", "generator": name} for name in ("one", "two")),
    )
    with pytest.raises(DataError, match=r"2 generators \(one, two"):
        read_response_set(mixed, "OURS", None)


def test_what_settings_say_of_every_prompt_is_as_if_the_file_said_it(tmp_path: Path) -> None:
    plain = jsonl(tmp_path / "plain.jsonl", {"prompt": "one", "response": "1"})
    complete = jsonl(tmp_path / "complete.jsonl", {"prompt": "one", "response": "2", "system": "Be brief."})
    settings = PromptSettings("Be brief.")
    ours, theirs = (read_response_set(file, "OURS", None, settings=settings) for file in (plain, complete))
    assert ours.rows["key"].to_list() == theirs.rows["key"].to_list()
    matched = match(ours, theirs)
    assert [turn["role"] for turn in matched.prompts["messages"][0].to_list()] == ["system", "user"]
    with pytest.raises(DataError, match="no prompt in common"):
        match(read_response_set(plain, "OURS", None), theirs)
