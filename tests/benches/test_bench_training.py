"""The bench of training: all ways have the same losses, and the fields of the results. No time is asserted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import training

pytestmark = pytest.mark.slow

ARGUMENTS = ["--smoke", "--pairs", "8", "--batch-size", "4", "--per-device-train-batch-size", "2", "--repeats", "1"]
ARGUMENTS += ["--device", "cpu", "--response-median", "6", "--max-response", "16", "--prompt-median", "4"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    assert training.main([*ARGUMENTS, "--out", str(folder), "--scratch", str(folder)]) == 0
    assert [file.name for file in folder.iterdir()] == ["training.json"]  # The models are deleted.
    results: dict[str, Any] = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    return results


def test_losses_are_the_same(results: dict[str, Any]) -> None:
    parity = results["parity"]
    assert 0 <= parity["max_loss_difference"] <= parity["tolerance"] == 1e-4
    assert len(parity["losses"]) == results["steps"] == 2
    assert parity["losses"][0] == pytest.approx(0.6931, abs=1e-3)


def test_fields(results: dict[str, Any]) -> None:
    assert list(results["ways"]) == ["stock", "ours", "ours_checkpoint", "score"]
    for way, row in results["ways"].items():
        assert row["peak_memory_bytes"] >= row["peak_before_bytes"] > 0
        assert row["wall_seconds"] == pytest.approx(sum(row["seconds"].values()))
        assert (row["seconds"]["reference"] > 0) == (way in ("stock", "score"))
        assert (row["seconds"]["tokenize"] > 0) == (way == "stock")
        assert (row["seconds"]["check"] > 0) == way.startswith("ours")
        assert (row["seconds"]["training"] > 0) == (row["seconds"]["save"] > 0) == (way != "score")
    ways, ratio = results["ways"], results["speedup_over_stock"]
    assert ratio["ours"]["wall"] == pytest.approx(ways["stock"]["wall_seconds"] / ways["ours"]["wall_seconds"])
    assert ratio["ours"]["work"] > ratio["ours, 50% replayed"]["work"] > ratio["ours, all replayed"]["work"] > 0
    spans = [ways[way]["seconds"]["training"] for way in ("stock", "ours")]
    assert results["same_work"] == pytest.approx(spans[0] / spans[1])
    assert results["machine"]["versions"]["trl"]
    assert results["lengths"]["chosen_ids"]["largest"] <= 16


def test_other_losses_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(way: str, *_: Any) -> dict[str, Any]:
        return {"losses": [0.693, 0.6] if way != "ours_checkpoint" else [0.693, 0.6002]}

    monkeypatch.setattr(training, "start", start)
    monkeypatch.setattr(training, "prepare", lambda *_: {})
    assert training.main([*ARGUMENTS, "--out", str(tmp_path), "--scratch", str(tmp_path)]) == 1
    assert list(tmp_path.iterdir()) == []
