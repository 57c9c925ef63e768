"""Values of an ablation as a person reads them, and the command that makes it again."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from made_ablations import made_results

from dice_py.ablation.arms import make_arms
from dice_py.config.loading import resolve
from dice_py.reporting.ablation_results import column_texts, command, measured, seed_texts, signed


@pytest.mark.parametrize(
    ("entry", "shown", "difference"),
    [
        ({"mean": 0.5432, "ci95": [0.512, 0.5755]}, "0.543 (0.512 to 0.576)", "+0.543 (+0.512 to +0.576)"),
        ({"mean": -0.0001, "ci95": [-0.02, 0.0201]}, "0.000 (-0.020 to 0.020)", "0.000 (-0.020 to +0.020)"),
        ({"mean": 41.52, "ci95": None}, "41.5", "+41.5"),
        ({"mean": 1234.5, "ci95": [1000, 2000]}, "1,234 (1,000 to 2,000)", "+1,234 (+1,000 to +2,000)"),
        ({"mean": 0.00123, "ci95": [None, 1]}, "0.00123", "+0.00123"),
        ({"mean": 0, "ci95": [0, 0]}, "0.000", "0.000"),
    ],
)
def test_values_as_a_person_reads_them(entry: dict[str, Any], shown: str, difference: str) -> None:
    found = measured(entry)
    assert found is not None
    assert (found.text(), found.text(signs=True)) == (shown, difference)


@pytest.mark.parametrize("entry", [None, 0.5, {}, {"mean": None}, {"mean": float("nan")}, {"mean": True}])
def test_what_is_no_value(entry: Any) -> None:
    assert measured(entry) is None


def test_values_by_seed() -> None:
    found = measured({"mean": 0.5, "ci95": None, "by_seed": [0.4, None, 0.6]})
    assert seed_texts(found, [3, 5, 7], [3, 4, 5, 6, 7], 3) == ["0.400", "–", "–", "–", "0.600"]
    assert seed_texts(found, [3, 5], [3, 5], 3) == ["–", "–"]  # whose they are is not known
    assert seed_texts(None, [3, 5], [3], 3) == ["–"]
    assert (signed(-0.0, 2), signed(-0.0001, 3), signed(0.0006, 3)) == ("0.00", "0.000", "+0.001")


def test_a_column_has_as_many_decimals_everywhere() -> None:
    entries = (
        {"mean": 0.0021, "ci95": [-1.2, 1.2]},
        None,
        {"mean": 0.5, "ci95": None},
        {"mean": 0.3, "ci95": [0.3, 0.3]},
    )
    column = column_texts([measured(entry) for entry in entries], signs=True)
    assert column == ["+0.002 (-1.200 to +1.200)", "–", "+0.500", "+0.300"]
    assert column_texts([measured({"mean": 400.25}), measured({"mean": 3.5})]) == ["400", "4"]
    assert column_texts([None]) == ["–"]


def test_the_command_makes_the_same_arms(tmp_path: Path) -> None:
    config = resolve([], ["replay.gamma=0.45", "mine.debias=bucket"])
    arms = make_arms(config, ("replay", "both"), ("linear", "matched"), ("dpo", "rdpo"), ("sigmoid", "ipo"))
    settings = {"replay.gamma": 0.45, "data.prompts": "my prompts; x.jsonl", "train.lora": None}
    words = shlex.split(command(made_results((3,), 1, arms=arms, settings=settings), tmp_path / "my folder"))
    assert words[:2] == ["dice", "ablate"]
    options = list(zip(words[2::2], words[3::2], strict=True))
    assert [value for name, value in options if name == "--set"] == [
        "replay.gamma=0.45", "data.prompts=my prompts; x.jsonl", "train.lora=null",
    ]  # fmt: skip
    given = dict(options)
    lists = [given[name].split(",") for name in ("--arms", "--debias", "--methods", "--losses")]
    assert make_arms(config, *lists) == arms
    assert given["--out"] == f"{tmp_path / 'my folder'}-again"
