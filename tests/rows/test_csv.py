"""CSV files: every cell is text, a row is named by the line that it begins in."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from property_examples import examples

from dice_py.data import read_pairs, read_prompts
from dice_py.errors import DataError
from dice_py.rows.bad_rows import BadRowRule
from dice_py.rows.sources import read_rows

TURNS = [{"role": "user", "content": 'Say "hi", please'}, {"role": "assistant", "content": "hi\n"}]
TURNS += [{"role": "user", "content": "Again."}]


def write(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t")])
def test_pairs_with_messages_numbers_and_line_ends(name: str, delimiter: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "two\nlines", "chosen": 'a, "b"\tc', "rejected": "x" * 200_000, "w": 0.5, "r": 1, "m": "-1e-3"},
        {"prompt": json.dumps(TURNS), "chosen": "007", "rejected": "8", "w": 2, "r": "0", "m": "4"},
    ]
    path = write(tmp_path / name, rows, delimiter)
    pairs = read_pairs(path, weight_column="w", round_column="r", margin_column="m", current_round=1)
    assert pairs["prompt"].to_list() == [[{"role": "user", "content": "two\nlines"}], TURNS]
    assert [turns[0]["content"] for turns in pairs["chosen"].to_list()] == ['a, "b"\tc', "007"]
    assert pairs.select("weight", "round", "margin").rows() == [(0.5, 1, -0.001), (2.0, 0, 4.0)]
    assert pairs["where"].to_list() == [f"{name}, line 2", f"{name}, line 4"]
    for bad in ("", "much", "nan", "-1"):
        with pytest.raises(DataError, match="line 2: 'w' must be a finite number ≥ 0, got "):
            read_pairs(write(path, [{**rows[1], "w": bad}], delimiter), weight_column="w")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"prompt,b\na\n", "line 2: has 1 cells, but the header has 2 columns (prompt, b)"),
        (b"prompt\na,b\n", "line 2: has 2 cells, but the header has 1 columns"),
        (b"prompt,prompt\na,b\n", "the header has the column 'prompt' twice"),
        (b'prompt\na\n"b\nc\n', "line 3: not valid CSV (unexpected end of data) in the row that begins here"),
        (b'prompt\n"a"b\n', "line 2: not valid CSV ("),
        (b"prompt\n\xe9\n", "line 2: 'prompt' is not UTF-8 text"),
        (b"prompt\n\na\n , \n", "line 4: has 2 cells"),
        (b"text\na\n", "line 2: no column 'prompt'; its columns are text."),
        (b"prompt\n", "holds no prompts"),
    ],
)
def test_what_is_wrong_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_prompts(path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


def test_a_bad_row_can_be_left_out_and_a_byte_order_mark_is_none_of_the_header(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("﻿prompt,b\r\nä,1\r\n".encode() + b"\xe9,2\r\nc\r\nd,3\r\n")
    prompts = read_prompts(path, rule=BadRowRule("skip", 0.5))
    assert [turns[0]["content"] for turns in prompts["messages"].to_list()] == ["ä", "d"]
    assert prompts["where"].to_list() == ["a.csv, line 2", "a.csv, line 5"]


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)


@settings(max_examples=examples(100), deadline=None)
@given(rows=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5), tab=st.booleans())
def test_what_python_writes_is_read(tmp_path_factory: Any, rows: list[tuple[str, str]], tab: bool) -> None:
    path = tmp_path_factory.getbasetemp() / ("fuzz.tsv" if tab else "fuzz.csv")
    write(path, [{"a": one, "b": two} for one, two in rows], "\t" if tab else ",")
    assert [tuple(row.columns.values()) for row in read_rows(path)] == rows
