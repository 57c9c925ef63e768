"""`dice mine --compare`: one table, or one JSON object, of several minings of the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import contents, scored
from rich.cells import cell_len

from cli.tables import comparison_lines, comparison_table, print_table
from dice_py.storage.parquet import read_parquet

pytestmark = pytest.mark.usefixtures("empty_folder")


def test_one_row_for_each_variant_and_nothing_is_written(dice) -> None:
    scored(Path("scored.parquet"))
    before = contents(Path())
    code, out, err = dice("mine", "scored.parquet", "--length-tolerance", 2, "--compare", "debias=none,linear,matched")
    assert (code, err) == (0, "")
    title, heads, *rows = out.splitlines()
    assert title == "pairs of scored.parquet"
    assert heads.split() == [
        "debias", "pairs", "overlap", "prompts", "α", "length", "gap", "longer", "corr.", "5", "%", "margin", "95", "%",
    ]  # fmt: skip
    assert [row.split()[:4] for row in rows] == [
        ["none", "20", "100.0%", "20"], ["linear", "20", "33.3%", "20"], ["matched", "20", "81.8%", "20"],
    ]  # fmt: skip
    assert contents(Path()) == before


def test_json_has_every_measure_and_both_matrices(dice) -> None:
    file = scored(Path("scored.parquet"))
    code, out, err = dice("mine", file, "--compare", "debias=none,linear", "--compare", "min_length=1,7", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert [entry["variant"] for entry in found["variants"]] == [
        "debias=none min_length=1", "debias=none min_length=7", "debias=linear min_length=1",
        "debias=linear min_length=7",
    ]  # fmt: skip
    assert found["variants"][1]["settings"] == {"debias": "none", "min_length": 7}
    assert found["variants"][1]["dropped"]["too_short"] == 40
    for name in ("overlap", "same_chosen"):
        assert [found[name][at][at] for at in range(4)] == [1.0] * 4
    alone = json.loads(dice("mine", file, "-o", "p.parquet", "--debias", "none", "--min-length", 7, "--json")[1])
    assert {name: found["variants"][1][name] for name in alone} == alone


def test_out_gets_the_pairs_of_all_variants(dice) -> None:
    file = scored(Path("scored.parquet"))
    assert dice("mine", file, "--compare", "debias=none,matched,linear", "-o", "pairs.parquet")[0] == 0
    assert set(read_parquet(Path("pairs.parquet"))["variant"]) == {"debias=none", "debias=linear"}


def test_a_variant_that_contradicts_itself_is_a_row_with_its_sentence(dice) -> None:
    code, out, _ = dice("mine", scored(Path("scored.parquet")), "--compare", "debias=none,matched")
    assert code == 0
    *_, row, sentence = out.splitlines()
    assert row.split() == ["matched", "refused"]
    assert sentence == (
        "debias=matched: debias 'matched' needs one of length_tolerance and length_ratio: set one of them"
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "Missing option --out (-o): name the file for the pairs (only --compare needs none)"),
        (("--compare", "debias"), 2, "--compare debias: write it as --compare option=value,value"),
        (("--debias", "none", "--compare", "debias=none,linear"), 2, "--debias is given together with --compare"),
        (("--compare", "debias=matched"), 2, "debias 'matched' needs one of length_tolerance and length_ratio"),
        (("--compare", "debias=none", "--memory", "1e-6"), 2, "and a comparison is not streamed"),
        (("--compare", "debias=none", "-o", "scored.parquet"), 2, "is one of the files to be mined"),
        (("--compare", "reward_column=reward,r"), 3, "column 'r' not found"),
    ],
)  # fmt: skip
def test_what_is_refused(dice, arguments: tuple[str, ...], code: int, message: str) -> None:
    found, out, err = dice("mine", scored(Path("scored.parquet")), *arguments)
    assert (found, out) == (code, "")
    assert message in err


def test_the_table_fits_in_100_columns_with_large_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    entry: dict[str, Any] = {
        "settings": {"debias": "per_token"}, "error": None, "pairs": 1_234_567, "prompts_with_pair": 1_234_567,
        "alpha": 0.00123456, "mean_length_gap_before": 1234.5, "mean_length_gap_after": -1234.5,
        "chosen_longer_share": 1.0, "reward_length_correlation_after": -0.004,
        "margin_quantiles": {"0.05": -0.000123456, "0.5": 123.456, "0.95": 1234.0},
    }  # fmt: skip
    empty = dict.fromkeys(entry) | {
        "settings": {"debias": "none"}, "pairs": 0, "prompts_with_pair": 0,
        "margin_quantiles": dict.fromkeys(entry["margin_quantiles"]),
    }  # fmt: skip
    refused = {"variant": "debias=matched", "settings": {"debias": "matched"}, "error": "needs a tolerance"}
    summary = {"variants": [refused, entry, empty], "overlap": [[None] * 3, [None, 1.0, 0.0], [None, 0.0, None]]}
    print_table(comparison_table(summary, "scored.parquet"))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(cell_len, lines)) <= 100
    assert lines[3].split()[1:] == [
        "1,234,567", "100.0%", "1,234,567", "0.00123", "1,234", "→", "-1,234", "100.0%", "0.00", "-0.000123",
        "123", "1.23e+03",
    ]  # fmt: skip
    assert lines[4].split() == ["none", "0", "0.0%", "0", "–", "–", "→", "–", "–", "–", "–", "–", "–"]
    assert comparison_lines(summary) == ["debias=matched: needs a tolerance"]
