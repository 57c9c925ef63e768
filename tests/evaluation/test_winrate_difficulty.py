"""The file that carries the difficulty of prompts to later comparisons."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from verdicts import BASELINE, drawn

from dice_py.errors import DamagedError, DataError, UsageError
from dice_py.evaluation.winrate.difficulty import read_difficulty, write_difficulty
from dice_py.evaluation.winrate.length_control import estimate_win_rates


def test_a_difficulty_file_gives_the_same_figures(tmp_path: Path) -> None:
    comparisons, _ = drawn(models=6, prompts=40)
    rates = estimate_win_rates(comparisons, resamples=0)
    path = tmp_path / "difficulty.json"
    write_difficulty(path, rates.difficulty)
    assert read_difficulty(path) == rates.difficulty
    again = estimate_win_rates(comparisons, read_difficulty(path), resamples=0)
    for one, other in zip(rates.models, again.models, strict=True):
        assert one.length_controlled_win_rate == pytest.approx(other.length_controlled_win_rate, abs=1e-4)
    stored = json.loads(path.read_text())
    assert stored["baseline"] == BASELINE
    assert stored["models"] == comparisons.models
    assert set(stored["gamma"]) == {f"prompt {at}" for at in range(40)}
    write_difficulty(path, rates.difficulty)  # its own file is replaced


def test_a_file_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    fitted = estimate_win_rates(drawn(models=3, prompts=9)[0], resamples=0).difficulty
    path = tmp_path / "notes.json"
    for content in ('{"my": "notes"}', "[1]", "plain text", '{"format": "dice prompt difficulty"}'):
        path.write_text(content)
        with pytest.raises(UsageError, match="holds something else"):
            write_difficulty(path, fitted)
        assert path.read_text() == content


def test_one_model_makes_no_difficulty(tmp_path: Path) -> None:
    fitted = estimate_win_rates(drawn(models=1)[0], resamples=0).difficulty
    with pytest.raises(UsageError, match="two models or more"):
        write_difficulty(tmp_path / "difficulty.json", fitted)
    assert not (tmp_path / "difficulty.json").exists()


def test_difficulty_files_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "difficulty.json"
    with pytest.raises(DataError, match="does not exist"):
        read_difficulty(path)
    write_difficulty(path, estimate_win_rates(drawn(models=3, prompts=9)[0], resamples=0).difficulty)
    text = path.read_text()
    path.write_text(text.replace('"ridge": 0.2', '"ridge": 0.3'))
    with pytest.raises(DamagedError, match="is damaged"):
        read_difficulty(path)
    own = {key: value for key, value in json.loads(text).items() if not key.startswith("dice.")}
    path.write_text(json.dumps(own))
    assert read_difficulty(path).models == ("model-0", "model-1", "model-2")  # of another program, without a digest
    moments = {"mean": 1.0, "variance": 1.0}
    for change, message in (
        ({"format": "x"}, "no difficulty file"), ({"version": 2}, "of version 2"), ({"gamma": []}, "'gamma' must be"),
        ({"gamma": {}}, "'gamma' must be"), ({"gamma": {"p": "1"}}, "'p of gamma' must be a number"),
        ({"gamma": {"p": math.nan}}, "must be a number, not nan"), ({"gamma": {"p": 10**400}}, "must be a number"),
        ({"baseline": 3}, "'baseline' must be a name"), ({"models": "a"}, "'models' a list"),
        ({"dispersion": 0}, "must be above 0"), ({"length_coefficient": 1}, "with 'mean' and 'variance'"),
        ({"length_coefficient": moments | {"variance": 0}}, "must be above 0"),
        ({"difficulty_coefficient": {"mean": 1}}, "must be a number, not None"), ({"ridge": True}, "not True"),
    ):  # fmt: skip
        path.write_text(json.dumps({**own, **change}))
        with pytest.raises(DataError) as refused:
            read_difficulty(path)
        assert message in str(refused.value), change
    for content in ("", "[]", "{", '{"a": 1', "\xff", "[" * 100_000):
        path.write_text(content, encoding="latin-1")
        with pytest.raises(DataError):
            read_difficulty(path)
