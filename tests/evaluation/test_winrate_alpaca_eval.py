"""AlpacaEval's two files are read and written as its own tool does."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from verdicts import ANNOTATION, BASELINE, response_rows, write_annotation_rows, write_jsonl

from dice_py.errors import DataError, DiceError, UsageError
from dice_py.evaluation.winrate.alpaca_eval import (
    ANNOTATIONS,
    OUTPUTS,
    read_annotations,
    read_model_outputs,
    write_annotations,
    write_model_outputs,
)
from dice_py.evaluation.winrate.export import write_alpaca_eval
from dice_py.evaluation.winrate.length_control import estimate_win_rates
from dice_py.evaluation.winrate.reading import read_comparisons


def test_annotations_are_read_from_both_sides(tmp_path: Path) -> None:
    turned = {"generator_1": "ours", "generator_2": BASELINE, "instruction": "Say no"}
    path = write_annotation_rows(tmp_path / "annotations.json", {}, turned, {"instruction": "tie", "preference": 0})
    found = read_comparisons([path], BASELINE).table.sort("instruction")
    assert found["instruction"].to_list() == ["Say hi", "Say no", "tie"]
    assert found["preference"].to_list() == [0.25, 0.75, 0.5]
    assert found["length"].to_list() == [2, 8, 2]
    assert found["baseline_length"].to_list() == [8, 2, 8]
    assert found["response"].to_list() == ["hi", "hi there", "hi"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preference": 2.5}, "item 0: 'preference' is 2.5, but must be from 1"),
        ({"preference": -1}, "must be from 1"),
        ({"preference": "2"}, "must be from 1"),
        ({"preference": True}, "must be from 1"),
        ({"output_1": None}, "item 0: 'output_1' must be text, not None"),
        ({"output_2": 5}, "'output_2' must be text, not 5"),
        ({"generator_1": "x", "generator_2": "y"}, "there is no model 'baseline'"),
    ],
)
def test_annotations_that_cannot_be_used(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DiceError) as refused:
        read_comparisons([write_annotation_rows(tmp_path / "annotations.json", change)], BASELINE)
    assert message in str(refused.value)


def test_annotations_of_other_pairs_are_named(tmp_path: Path) -> None:
    path = write_annotation_rows(tmp_path / "annotations.json", {}, {"generator_1": "third", "instruction": "other"})
    with pytest.raises(DataError, match="row 1: 'third' is compared with 'ours'"):
        read_comparisons([path], BASELINE)


def test_annotations_lack_a_field(tmp_path: Path) -> None:
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps([{key: value for key, value in ANNOTATION.items() if key != "preference"}]))
    with pytest.raises(DataError, match="no field 'preference'"):
        read_annotations(path)
    path.write_text(json.dumps([{key: value for key, value in ANNOTATION.items() if key != "output_1"}]))
    with pytest.raises(DataError, match="no field 'output_1'"):
        read_annotations(path)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    texts = ["plain", 'quote " and \\ slash', "new\nline\u2028\x00\x1b[2J", "日本語 😀"]
    table = pl.DataFrame(
        {
            "instruction": texts, "output_1": texts[::-1], "generator_1": "a/b", "output_2": "", "generator_2": "c",
            "preference": [1.0, 1.5, 2.0, None], "annotator": [None, "j", "j", "j"], "dataset": ["d", None, None, "d"],
        },
        schema=ANNOTATIONS,
    )  # fmt: skip
    write_annotations(tmp_path / "annotations.json", table.with_columns(further=1))
    assert read_annotations(tmp_path / "annotations.json").equals(table)
    outputs = table.select("instruction", "dataset", output="output_1", generator="generator_1").select(*OUTPUTS)
    write_model_outputs(tmp_path / "outputs.json", outputs)
    assert read_model_outputs(tmp_path / "outputs.json").equals(outputs)


def test_files_are_as_alpaca_eval_reads_them(tmp_path: Path) -> None:
    """pandas reads both, in the order of the rows; a win rate is the mean of preference − 1 over rows that have one."""
    pandas = pytest.importorskip("pandas")
    comparisons = read_comparisons([write_jsonl(tmp_path / "rows.jsonl", response_rows(2, 6))], BASELINE)
    table = comparisons.table.with_columns(
        preference=pl.when((pl.col("prompt") != "2") | (pl.col("model") != "model-1")).then("preference")
    )
    comparisons = replace(comparisons, table=table)
    assert write_alpaca_eval(tmp_path / "out", comparisons) == []
    for rates in estimate_win_rates(comparisons, resamples=0).models:
        frame = pandas.read_json(tmp_path / "out" / rates.model / "annotations.json")
        assert frame["instruction"].tolist() == [f"prompt {at}" for at in range(6)]
        assert frame["generator_1"].unique().tolist() == [BASELINE]
        assert frame["generator_2"].unique().tolist() == [rates.model]
        assert frame["annotator"].unique().tolist() == ["unknown"]
        assert 100 * (frame["preference"] - 1).mean() == pytest.approx(rates.win_rate)
        assert frame["preference"].isna().sum() == rates.no_verdict == (rates.model == "model-1")
        outputs = pandas.read_json(tmp_path / "out" / rates.model / "model_outputs.json")
        assert outputs["output"].str.len().mean() == pytest.approx(rates.mean_length)
    baseline = pandas.read_json(tmp_path / "out" / BASELINE / "model_outputs.json")
    assert baseline["generator"].unique().tolist() == [BASELINE]
    again = read_comparisons(sorted((tmp_path / "out").glob("*/annotations.json")), BASELINE)
    for one, other in zip(
        estimate_win_rates(again, resamples=0).models, estimate_win_rates(comparisons, resamples=0).models, strict=True
    ):
        assert one.length_controlled_win_rate == pytest.approx(other.length_controlled_win_rate, abs=1e-4)


def test_export_refuses_what_it_would_lose(tmp_path: Path) -> None:
    comparisons = read_comparisons([write_jsonl(tmp_path / "rows.jsonl", response_rows(2, 3))], BASELINE)
    there = tmp_path / "out" / "model-1" / "annotations.json"
    there.parent.mkdir(parents=True)
    there.write_text("mine")
    with pytest.raises(UsageError, match="is there: name another folder"):
        write_alpaca_eval(tmp_path / "out", comparisons)
    assert there.read_text() == "mine"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model-1"]
    for name in ("..", "a\0b"):
        only = comparisons.table.filter(pl.col("model") == "model-0").with_columns(model=pl.lit(name))
        renamed = replace(comparisons, table=only)
        with pytest.raises(UsageError, match="no folder can be named"):
            write_alpaca_eval(tmp_path / "other", renamed)
    table = comparisons.table.with_columns(model=pl.col("model").replace({"model-0": "a/b", "model-1": "a__b"}))
    with pytest.raises(UsageError, match="no folder can be named"):
        write_alpaca_eval(tmp_path / "other", replace(comparisons, table=table))
    silent = replace(comparisons, table=comparisons.table.with_columns(response=pl.lit(None, pl.String)))
    with pytest.raises(DataError, match="the text of the response is not known"):
        write_alpaca_eval(tmp_path / "other", silent)
    assert not (tmp_path / "other").exists()


def test_export_tells_of_missing_prompts(tmp_path: Path) -> None:
    comparisons = read_comparisons([write_jsonl(tmp_path / "rows.jsonl", response_rows(2, 3))], BASELINE)
    short = comparisons.table.filter((pl.col("prompt") != "0") | (pl.col("model") != "model-1"))
    notes = write_alpaca_eval(tmp_path / "out", replace(comparisons, table=short))
    assert "1 models lack prompts" in notes[0]
    assert "model-1 (1)" in notes[0]


@pytest.mark.parametrize("preference", [0.5, 2.01, math.nan])
def test_a_wrong_preference_is_not_written(tmp_path: Path, preference: float) -> None:
    table = pl.DataFrame([{**ANNOTATION, "preference": preference}])
    with pytest.raises(DataError, match="not from 1 to 2"):
        write_annotations(tmp_path / "annotations.json", table)
    with pytest.raises(DataError, match="no column 'annotator'"):
        write_annotations(tmp_path / "annotations.json", table.drop("annotator"))
    with pytest.raises(DataError, match="'output_1' of row 0 is null"):
        write_annotations(tmp_path / "annotations.json", table.with_columns(output_1=pl.lit(None, pl.String)))
    assert not (tmp_path / "annotations.json").exists()
