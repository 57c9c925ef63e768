"""Rows that cannot be used: refused with file and line, or skipped and counted; and the odd forms that files have."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from notes import Notes

from dice_py.data import read_pairs, read_prompts
from dice_py.errors import DataError
from dice_py.rows.bad_rows import BadRowRule

PAIR = {"prompt": "hi", "chosen": "a", "rejected": "b"}
SKIP = BadRowRule("skip", 0.5)


def write(path: Path, *lines: str | dict[str, Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_the_error_names_the_line_and_the_option_that_skips_it(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "a"}, "", {"prompt": ""}, {"prompt": "b"})
    with pytest.raises(DataError, match=r"p\.jsonl, line 3: 'prompt' is an empty text; .*--set data\.on_bad_row=skip"):
        read_prompts(path)


def test_skipped_rows_are_counted_and_the_first_five_named(tmp_path: Path) -> None:
    log = Notes()
    rows = [{"prompt": f"Say {i}"} for i in range(8)]
    bad = ["{", {"prompt": None}, {"question": "a"}, {"prompt": 5}, {"prompt": []}, {"prompt": " "}, "[1]"]
    prompts = read_prompts(write(tmp_path / "p.jsonl", *rows, *bad), rule=SKIP, report=log)
    assert prompts.height == 8
    (note,) = log.texts
    assert "7 of 15 prompts skipped (data.on_bad_row=skip): " in note
    assert note.count("p.jsonl, line") == 5
    assert "line 9: not valid JSON" in note
    assert note.endswith("; and 2 more")


def test_too_many_bad_rows_are_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", PAIR, {"prompt": "hi"}, {"prompt": "ho"})
    with pytest.raises(DataError, match=r"2 of 3 pairs cannot be used, more than data\.max_bad_rows \(0\.5\) allows: "):
        read_pairs(path, rule=SKIP)
    assert read_pairs(path, rule=BadRowRule("skip", 0.7)).height == 1


def test_equal_answers_are_counted(tmp_path: Path) -> None:
    log = Notes()
    same = [{"prompt": f"Why {i}?", "chosen": "So.", "rejected": "So."} for i in range(5)]
    assert read_pairs(write(tmp_path / "q.jsonl", PAIR, *same), report=log).height == 1
    assert log.texts == [f"{tmp_path / 'q.jsonl'}: 5 of 6 pairs left out: chosen and rejected are equal"]


def test_a_null_prompt_is_called_null(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"q.jsonl, line 2: 'prompt' is null") as caught:
        read_pairs(write(tmp_path / "q.jsonl", PAIR, {**PAIR, "prompt": None}))
    assert "no column" not in str(caught.value)


def test_one_object_a_line_under_the_name_json(tmp_path: Path) -> None:
    prompts = read_prompts(write(tmp_path / "p.json", {"prompt": "a"}, "", {"prompt": "b"}))
    assert prompts["where"].to_list() == ["p.json, line 1", "p.json, line 3"]
    with pytest.raises(DataError, match=r"p.json, line 2: not valid JSON"):
        read_prompts(write(tmp_path / "p.json", {"prompt": "a"}, "{"))
    with pytest.raises(DataError, match=r"must hold one list of objects; one object per line is \.jsonl"):
        read_prompts(write(tmp_path / "p.json", json.dumps({"prompt": "a"}, indent=1)))


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_an_integer_of_5000_digits(tmp_path: Path, kind: str) -> None:
    digits = "7" * 5000
    lines = ['{"prompt": "a", "id": ' + digits + "}", '{"prompt": "b", "id": 1}']
    path = tmp_path / f"p.{kind}"
    path.write_text("\n".join(lines) if kind == "jsonl" else f"[{','.join(lines)}]")
    assert read_prompts(path).height == 2
    path = write(tmp_path / "q.jsonl", json.dumps({**PAIR, "w": 1})[:-2] + digits + "}")
    with pytest.raises(DataError, match="line 1: 'w' must be a finite number ≥ 0, got inf"):
        read_pairs(path, weight_column="w")


def test_decimals_and_whole_floats_are_numbers(tmp_path: Path) -> None:
    rows = [
        {**PAIR, "w": Decimal("2"), "m": Decimal("0.25"), "r": 1.0},
        {**PAIR, "w": Decimal("3"), "m": None, "r": 2.0},
    ]
    rows[1]["m"] = Decimal("-1.5")
    schema = {"w": pl.Decimal(18, 0), "m": pl.Decimal(10, 2)}
    pl.DataFrame(rows, schema_overrides=schema).write_parquet(tmp_path / "q.parquet")
    pairs = read_pairs(tmp_path / "q.parquet", weight_column="w", margin_column="m", round_column="r")
    assert pairs.select("weight", "margin", "round").rows() == [(2.0, 0.25, 1), (3.0, -1.5, 2)]


@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_under_the_name_jsonl(tmp_path: Path, indent: int | None) -> None:
    path = write(tmp_path / "p.jsonl", json.dumps([{"prompt": "a"}, {"prompt": "b"}], indent=indent))
    assert read_prompts(path)["where"].to_list() == ["p.jsonl, item 0", "p.jsonl, item 1"]
    # A line that is a list is no row, and not a file of its own either.
    with pytest.raises(DataError, match=r"p\.jsonl, line 1: expected a JSON object, not a list"):
        read_prompts(write(tmp_path / "p.jsonl", '["a"]', {"prompt": "b"}))


@pytest.mark.parametrize(
    "line", ['{"prompt": "a", "prompt": "b"}', '{"prompt": [{"role": "user", "content": "", "content": "b"}]}']
)
def test_a_key_that_is_there_twice(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "a"}, line)
    with pytest.raises(DataError, match=r"p\.jsonl, line 2: a JSON object has the key '(prompt|content)' twice"):
        read_prompts(path)
    assert read_prompts(path, rule=SKIP).height == 1


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "9" * 5000])
def test_numbers_that_json_cannot_say_do_not_reach_a_template(tmp_path: Path, value: str) -> None:
    line = '{"prompt": "a", "tools": [{"name": "f", "most": ' + value + "}]}"
    with pytest.raises(DataError, match=r"p\.jsonl, line 1: 'tools' holds .* which is not JSON"):
        read_prompts(write(tmp_path / "p.jsonl", line))


def test_a_single_message_is_a_list_of_one(tmp_path: Path) -> None:
    message = {"role": "user", "content": "a"}
    one = read_prompts(write(tmp_path / "p.jsonl", {"prompt": message}))["messages"].to_list()
    assert one == read_prompts(write(tmp_path / "p.jsonl", {"prompt": [message]}))["messages"].to_list()
