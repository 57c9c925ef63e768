"""What must hold of `dice run --rounds 2` on the embedded default: the whole loop, for real, with its default seed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from places import child_environment

from dice_py.synthetic.task import oracle

Dice = Callable[..., tuple[int, str, str]]

pytestmark = pytest.mark.slow

LIGHT = ("--set", "report.token_credit=false")
"""Without credits, whose passes would take a minute here."""
KEYS = {
    "oracle_win_rate",
    "oracle_win_rate_ci95",
    "oracle_accuracy",
    "start_oracle_accuracy",
    "mean_response_tokens",
    "start_mean_response_tokens",
    "implicit_reward_accuracy",
    "length_only_accuracy",
}


def _run(cache: Path, folder: Path, *options: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", "run", "--rounds", "2", "--run-dir", str(folder), "--json", *options],
        env=child_environment(DICE_CACHE=str(cache)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    metrics: dict[str, Any] = json.loads(done.stdout)["metrics"]
    return metrics


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs."""
    return tmp_path_factory.mktemp("world")


@pytest.fixture(scope="module")
def penalized(base: Path) -> dict[str, Any]:
    """The metrics of both rounds with the length penalty."""
    return _run(base / "cache", base / "linear", *LIGHT)


@pytest.fixture(scope="module")
def unpenalized(base: Path) -> dict[str, Any]:
    """The metrics of both rounds without it, from the same start."""
    return _run(base / "cache", base / "none", "--set", "mine.debias=none", *LIGHT)


def _growth(metrics: dict[str, Any]) -> float:
    return float(metrics["mean_response_tokens"] / metrics["start_mean_response_tokens"])


def _check_metrics(metrics: dict[str, Any]) -> None:
    assert list(metrics) == ["round-01", "round-02"]
    for found in metrics.values():
        assert found.keys() >= KEYS
        low, high = found["oracle_win_rate_ci95"]
        assert low <= found["oracle_win_rate"] <= high


def test_metrics_are_all_there(penalized: dict[str, Any]) -> None:
    _check_metrics(penalized)


def test_length_stays_with_the_penalty(penalized: dict[str, Any]) -> None:
    for metrics in penalized.values():
        assert abs(_growth(metrics) - 1) <= 0.10


@pytest.mark.long
def test_length_grows_without_the_penalty(unpenalized: dict[str, Any]) -> None:
    _check_metrics(unpenalized)
    growth = [_growth(metrics) for metrics in unpenalized.values()]
    assert growth[1] > growth[0] > 1.05
    assert growth[1] > 1.10


def test_wins_against_the_start_after_two_rounds(penalized: dict[str, Any]) -> None:
    assert penalized["round-02"]["oracle_win_rate"] > 0.5


@pytest.mark.long
def test_the_audit_tells_a_dpo_tuned_policy_from_its_swap(
    penalized: dict[str, Any], base: Path, tmp_path: Path, dice: Dice
) -> None:
    """`dice audit` on the world that a run has: its held-out pairs are labeled by the oracle."""
    del penalized  # they made the world
    world = base / "linear" / "inputs" / "world"
    policy, sft = world / "policy" / "model", world / "sft"
    pairs = world / "eval_pairs.parquet"
    code, text, err = dice("audit", pairs, "--policy", policy, "--reference", sft, "--beta", 1, "--json")
    assert code == 0, err
    figures = json.loads(text)
    assert figures["verdict"] == "usable"
    by_name = {entry["choice"]: entry["metrics"] for entry in figures["choices"]}
    plain, penalized = (by_name[f"previous, {form}"] for form in ("sum", "penalized"))
    assert plain["accuracy"]["value"] > 0.75
    assert penalized["length_balanced_accuracy"]["value"] > plain["length_balanced_accuracy"]["value"]
    assert penalized["accuracy_over_length"]["ci95"][0] > 0.1
    length = figures["length_alone"]["metrics"]["length_balanced_accuracy"]
    assert length["value"] == 0.5
    code, text, err = dice("audit", pairs, "--policy", sft, "--reference", policy, "--beta", 1, "--json")
    assert code == 0, err
    swapped = json.loads(text)
    assert swapped["verdict"] == "at chance"
    assert "swapped" in swapped["reason"]
    # The same answers as a verifiable set: the oracle says right or wrong.
    rows = []
    for prompt, chosen, rejected in pl.read_parquet(pairs).select("prompt", "chosen", "rejected").iter_rows():
        for answer in (chosen, rejected):
            rows.append({"prompt": prompt, "response": answer, "score": oracle(prompt, answer[0]["content"])[0]})
    pl.DataFrame(rows).write_parquet(tmp_path / "scored.parquet")
    arguments = ("--policy", policy, "--reference", sft, "--beta", 1, "--out", tmp_path / "out", "--json")
    code, text, err = dice("audit", tmp_path / "scored.parquet", *arguments)
    assert code == 0, err
    scored = json.loads(text)
    of_sets = {entry["choice"]: entry for entry in scored["choices"]}["previous, sum"]
    assert of_sets["metrics"]["accuracy"]["value"] == pytest.approx(plain["accuracy"]["value"], abs=0.02)
    assert of_sets["metrics"]["end_score"]["value"] > of_sets["curve"][0]


@pytest.mark.long
def test_the_audit_of_a_round_is_what_the_round_reports(penalized: dict[str, Any], base: Path, dice: Dice) -> None:
    code, text, err = dice("audit", "--run", base / "linear", "--json")
    assert code == 0, err
    found = {entry["choice"]: entry["metrics"]["accuracy"]["value"] for entry in json.loads(text)["choices"]}
    reported = penalized["round-02"]
    assert found["previous, sum"] == pytest.approx(reported["implicit_reward_accuracy"])
    assert found["initial, sum"] == pytest.approx(reported["implicit_reward_accuracy_initial_reference"])
