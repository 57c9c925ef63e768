"""Files of verdicts with one row per response: columns, scales, lengths, and rows that cannot be used."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from verdicts import BASELINE, response_rows, write_jsonl, write_rows

from dice_py.errors import DataError, UsageError
from dice_py.evaluation.winrate.alpaca_eval import (
    write_model_outputs,
)
from dice_py.evaluation.winrate.reading import read_comparisons
from dice_py.evaluation.winrate.responses import Columns


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_rows_of_responses(tmp_path: Path, suffix: str) -> None:
    values = response_rows(models=2, prompts=3)
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pl.DataFrame(values).write_parquet(path)
    elif suffix == ".json":
        path.write_text(json.dumps(values))
    else:
        write_jsonl(path, values)
    found = read_comparisons([path], BASELINE)
    assert found.models == ["model-0", "model-1"]
    assert found.baseline_length == 2000
    for row in found.table.iter_rows(named=True):
        source = next(v for v in values if v["model"] == row["model"] and str(v["prompt_id"]) == row["prompt"])
        assert row["preference"] == source["score"]
        assert (row["length"], row["baseline_length"]) == (len(source["response"]), 2000)
        assert (row["response"], row["instruction"]) == (source["response"], source["prompt"])


@pytest.mark.parametrize(("key", "text"), [(7, "7"), (7.0, "7"), ("x", "x"), ([{"a": "é"}], '[{"a": "é"}]')])
def test_prompt_ids_of_any_type(tmp_path: Path, key: Any, text: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", {"prompt_id": key})
    assert read_comparisons([path], BASELINE).table["prompt"].to_list() == [text]


def test_other_columns_and_several_files(tmp_path: Path) -> None:
    names = {"prompt_id": "question", "model": "who", "score": "p", "response": "answer"}
    values = [{names.get(key, key): value for key, value in row.items()} for row in response_rows(2, 4)]
    values = [{**row, "characters": len(row["answer"]) + 1} for row in values]
    files = [write_jsonl(tmp_path / f"{at}.jsonl", values[at::3]) for at in range(3)]
    found = read_comparisons(files, BASELINE, Columns("question", "who", "p", "characters", "answer"))
    default = read_comparisons([write_jsonl(tmp_path / "all.jsonl", response_rows(2, 4))], BASELINE)
    order = ["prompt", "model"]
    assert found.table.sort(order)["preference"].equals(default.table.sort(order)["preference"])
    assert (found.table.sort(order)["length"] - 1).equals(default.table.sort(order)["length"])
    assert found.baseline_length == 2001


@pytest.mark.parametrize(
    ("scores", "own", "scale", "expected"),
    [
        ([80.0, 20.0], 50.0, "auto", [0.8, 0.2]),
        ([0.8, 0.2], 0.5, "auto", [0.8, 0.2]),
        ([0.8, 0.2], 50.0, "auto", [0.008, 0.002]),  # a weak model, told by the baseline's own rows
        ([0.8, 0.2], None, "100", [0.008, 0.002]),
        ([0.8, 1.0], None, "auto", [0.8, 1.0]),
        ([1, 0], 0.5, "1", [1.0, 0.0]),
        ([100, None], 50, "auto", [1.0, None]),
        ([math.nan, 3], 50, "auto", [None, 0.03]),
    ],
)
def test_scales_of_preferences(tmp_path: Path, scores: list[Any], own: Any, scale: Any, expected: list[Any]) -> None:
    values = [{"prompt_id": at, "model": BASELINE, "score": own, "response": "b"} for at in range(2)]
    values += [{"prompt_id": at, "model": "a", "score": score, "response": "r"} for at, score in enumerate(scores)]
    found = read_comparisons([write_jsonl(tmp_path / "rows.jsonl", values)], BASELINE, scale=scale)
    assert found.table["preference"].to_list() == pytest.approx(expected)
    assert bool(found.notes) is (own is None and scale == "auto")


def test_lengths_come_from_response_chars_before_the_text(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", {"response": "text", "response_chars": 9})
    assert read_comparisons([path], BASELINE).table["length"].to_list() == [9]
    path = write_rows(tmp_path / "rows.jsonl", {"response": "日本"})
    assert read_comparisons([path], BASELINE).table["length"].to_list() == [2]
    path = write_rows(tmp_path / "rows.jsonl", {})
    assert read_comparisons([path], BASELINE).table["length"].to_list() == [None]


def test_outputs_have_the_lengths_of_a_baseline_without_rows(tmp_path: Path) -> None:
    values = [row for row in response_rows(2, 3) if row["model"] != BASELINE]
    path = write_jsonl(tmp_path / "rows.jsonl", values)
    with pytest.raises(UsageError, match="there is no model 'baseline'"):
        read_comparisons([path], BASELINE)
    outputs = tmp_path / "outputs.json"
    write_model_outputs(
        outputs,
        pl.DataFrame(
            {"instruction": [f"prompt {at}" for at in range(3)], "output": ["b" * 5] * 3, "generator": BASELINE}
        ),
    )
    found = read_comparisons([path], BASELINE, outputs=[outputs])
    assert found.table["baseline_length"].to_list() == [5] * 6
    by_text = read_comparisons([path], BASELINE, Columns(prompt="prompt"), outputs=[outputs])
    assert by_text.table["baseline_length"].to_list() == [5] * 6


REFUSED_ROWS: list[tuple[dict[str, Any], str]] = [
    ({"score": 101}, "line 2: 'score' must be a number from 0 to 100"),
    ({"score": -0.1}, "line 2: 'score' must be a number from 0 to 100"),
    ({"score": "0.5"}, "not '0.5'"),
    ({"score": True}, "not True"),
    ({"score": math.inf}, "not inf"),
    ({"prompt_id": None}, "'prompt_id' must be text or an integer, not None"),
    ({"prompt_id": 0.5}, "'prompt_id' must be text or an integer, not 0.5"),
    ({"prompt_id": True}, "not True"),
    ({"prompt_id": ""}, "not ''"),
    ({"model": None}, "'model' must be text"),
    ({"response_chars": -1}, "'response_chars' must be a number of characters, not -1"),
    ({"response_chars": 1.5}, "not 1.5"),
    ({"response_chars": "9"}, "not '9'"),
    ({"response_chars": 10**30}, "must be a number of characters"),
    ({"response_chars": math.nan}, "not nan"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED_ROWS)
def test_a_row_that_cannot_be_used_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as refused:
        read_comparisons([write_rows(tmp_path / "rows.jsonl", change)], BASELINE)
    assert message in str(refused.value)
    assert "rows.jsonl, line 2" in str(refused.value)


def test_missing_columns_are_named_with_their_option(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt_id": 1, "model": "a", "p": 1}])
    with pytest.raises(DataError, match=r"no column 'score'.*--preference-column"):
        read_comparisons([path], BASELINE)
    with pytest.raises(DataError, match=r"no column 'chars'.*--length-column"):
        read_comparisons([write_rows(path, {})], BASELINE, Columns(length="chars"))


def test_a_response_that_is_there_twice(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="prompt '1' has 2 rows of the model 'ours'"):
        read_comparisons([write_rows(tmp_path / "rows.jsonl", {}, {})], BASELINE)
    twice = [{"prompt_id": 1, "model": BASELINE, "score": 0.5, "response": "x"}] * 2
    path = write_jsonl(tmp_path / "twice.jsonl", [*twice, {"prompt_id": 1, "model": "a", "score": 1.0}])
    with pytest.raises(DataError, match="prompt '1' has 2 rows of the model 'baseline'"):
        read_comparisons([path], BASELINE)


def test_baselines_that_cannot_be_one(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", response_rows(3, 5))
    for baseline, start in (("nobody", "--baseline: there is no model 'nobody'"), (None, "name the baseline")):
        with pytest.raises(UsageError) as refused:
            read_comparisons([path], baseline)
        assert str(refused.value).startswith(start)
        assert "baseline, model-0, model-1, model-2" in str(refused.value)
    with pytest.raises(DataError, match="a model ties with itself"):
        read_comparisons([path], "model-1")
    alone = write_jsonl(tmp_path / "alone.jsonl", [row for row in response_rows() if row["model"] == BASELINE])
    with pytest.raises(UsageError, match="no model besides the baseline"):
        read_comparisons([alone], BASELINE)


@pytest.mark.parametrize("content", ["", "\n\n", "[]"])
def test_files_without_rows(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(DataError):
        read_comparisons([path], BASELINE)


def test_a_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    text = write_rows(tmp_path / "rows.jsonl", {}).read_text()
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert read_comparisons([tmp_path / "bom.jsonl"], BASELINE).models == ["ours"]


def test_a_key_that_is_there_twice(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt_id": 1, "model": "a", "score": 1, "score": 0}\n')
    with pytest.raises(DataError, match="twice"):
        read_comparisons([path], BASELINE)
