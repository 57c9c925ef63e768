"""What must hold of `dice run --rounds 2` on the embedded default: the whole loop, for real, with its default seed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from places import child_environment

pytestmark = pytest.mark.slow

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
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The metrics of both rounds with the length penalty and without it, from the same start."""
    base = tmp_path_factory.mktemp("world")
    return {
        "linear": _run(base / "cache", base / "linear"),
        "none": _run(base / "cache", base / "none", "--set", "mine.debias=none"),
    }


def _growth(metrics: dict[str, Any]) -> float:
    return float(metrics["mean_response_tokens"] / metrics["start_mean_response_tokens"])


def test_metrics_are_all_there(runs: dict[str, dict[str, Any]]) -> None:
    for metrics in runs.values():
        assert list(metrics) == ["round-01", "round-02"]
        for found in metrics.values():
            assert found.keys() >= KEYS
            low, high = found["oracle_win_rate_ci95"]
            assert low <= found["oracle_win_rate"] <= high


def test_length_stays_with_the_penalty(runs: dict[str, dict[str, Any]]) -> None:
    for metrics in runs["linear"].values():
        assert abs(_growth(metrics) - 1) <= 0.10


def test_length_grows_without_the_penalty(runs: dict[str, dict[str, Any]]) -> None:
    growth = [_growth(metrics) for metrics in runs["none"].values()]
    assert growth[1] > growth[0] > 1.05
    assert growth[1] > 1.10


def test_wins_against_the_start_after_two_rounds(runs: dict[str, dict[str, Any]]) -> None:
    assert runs["linear"]["round-02"]["oracle_win_rate"] > 0.5
