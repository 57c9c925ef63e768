"""The bench of training: all ways have the same losses, and the fields of the results. No time is asserted."""

from __future__ import annotations

import json
import subprocess
import weakref
from pathlib import Path
from typing import Any

import pytest
import shapes
import torch
import training
import training_report

from dice_py.training.step0 import Step0

ARGUMENTS = ["--smoke", "--pairs", "8", "--batch-size", "4", "--per-device-train-batch-size", "2", "--repeats", "1"]
ARGUMENTS += ["--device", "cpu", "--response-median", "6", "--max-response", "16", "--prompt-median", "4"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    assert training.main([*ARGUMENTS, "--out", str(folder), "--scratch", str(folder)]) == 0
    assert [file.name for file in folder.iterdir()] == ["training.json"]  # The models are deleted.
    results: dict[str, Any] = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    return results


@pytest.mark.long
@pytest.mark.slow
def test_losses_are_the_same(results: dict[str, Any]) -> None:
    parity = results["parity"]
    assert 0 <= parity["max_loss_difference"] <= parity["tolerance"] == 1e-4
    assert len(parity["losses"]) == results["steps"] == 2
    assert parity["losses"][0] == pytest.approx(0.6931, abs=1e-3)


@pytest.mark.long
@pytest.mark.slow
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


STEP0 = {"loss": 0.693, "max_abs_difference": 0.3, "rms_difference": 0.1, "spread": 0.1, "pairs": 8, "beta": 0.1}


def test_in_16_bits_the_tolerance_follows_from_the_measured_spread() -> None:
    given = ["--dtype", "bfloat16", "--pairs", "20", "--batch-size", "8"]
    options = training.parse(given)
    tolerance = training.loss_tolerance(options, [STEP0])
    # Of the smallest step, which has 4 pairs.
    assert tolerance == Step0(**STEP0 | {"pairs": 4}).loss_limit()  # type: ignore[arg-type]
    assert training.loss_tolerance(options, [STEP0 | {"spread": 1.0}, STEP0]) > 5 * tolerance
    assert training.loss_tolerance(options, []) is None
    assert training.loss_tolerance(training.parse([*given, "--tolerance", "0.5"]), []) == 0.5
    float32 = training.parse(["--dtype", "float32"])
    assert training.loss_tolerance(float32, [STEP0]) == training_report.FLOAT32_TOLERANCE == 1e-4
    # The train stage's own check has no constant either.
    assert training.settings(options, "ours").step0_tolerance == "auto"


@pytest.mark.parametrize(
    ("dtype", "step0", "difference"),
    [("float32", STEP0, 2e-4), ("bfloat16", STEP0, 0.03), ("bfloat16", None, 0.0)],
)
def test_other_losses_write_nothing(
    dtype: str, step0: Any, difference: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(way: str, *_: Any) -> dict[str, Any]:
        return {"losses": [0.693, 0.6 + (difference if way == "ours_checkpoint" else 0.0)], "step0": step0}

    monkeypatch.setattr(training, "start", start)
    monkeypatch.setattr(training, "prepare", lambda *_: {})
    assert training.main([*ARGUMENTS, "--dtype", dtype, "--out", str(tmp_path), "--scratch", str(tmp_path)]) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_a_way_made_is_removed_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def child(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        for made in ("tmpabc/model", "stock/checkpoint-1", "stock-model", "cache-1/x"):
            (tmp_path / made).mkdir(parents=True)
        (tmp_path / "ours.json").write_text(json.dumps({"spans": {}, "losses": [], "step0": None}))
        return subprocess.CompletedProcess(command, 0, "")

    (tmp_path / "model").mkdir()
    monkeypatch.setattr(subprocess, "run", child)
    training.start("ours", tmp_path, training.parse([]))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "ours.json"]


def test_a_made_model_stays_in_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, the cache is given back after the model is gone: the processes that load it need the room."""
    models: list[weakref.ref[Any]] = []
    emptied: list[bool] = []
    make = shapes.make_model

    def make_model(shape: str, dtype: torch.dtype, device: str, seed: int, **changes: Any) -> Any:
        assert device == "cuda"
        model = make(shape, dtype, "cpu", seed, **changes)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(shapes, "make_model", make_model)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(models[0]() is None))
    options = training.parse([*ARGUMENTS, "--device", "cuda"])
    training.prepare(tmp_path, options)
    assert emptied == [True]
    assert (tmp_path / "model" / "config.json").exists()
