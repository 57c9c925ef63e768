"""The bench on a real model, on a tiny one: its ratios, and losses beside those of stock TRL. No time is asserted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import real
import real_ways
from real_report import draw, show
from rich.console import Console
from tiny_generation import CONFIG, Stage, questions
from tiny_models import make_llama

RESULT: dict[str, Any] = {
    "model": "tiny",
    "machine": {"cpu": "a CPU", "cores": 2},
    "generation": {"seconds": 30.0, "vllm_seconds": 40.0, "time_over_vllm": 0.75},
    "scoring": {"seconds": 10.0, "trl_seconds": 35.0, "speedup_over_trl": 3.5},
    "training": {
        "seconds": 20.0, "trl_best_seconds": 40.0, "trl_default_seconds": 60.0, "trl_best_batch": 1,
        "speedup_over_trl_best": 2.0, "speedup_over_trl_default": 3.0, "share_of_matrix_rate": 0.5, "peak_gb": 4.0,
        "trl_best_peak_gb": 4.5,
    },
    "allocator": {
        "train": {
            "set": {"seconds": 20.0, "system_seconds": 1.0, "peak_gb": 4.0},
            "glibc": {"seconds": 27.5, "system_seconds": 9.0, "peak_gb": 3.5},
        },
    },
    "plan": {"seconds": 50.0, "planned_seconds": 90.0, "taken_seconds": 100.0, "planned_over_taken": 0.9},
}  # fmt: skip


def test_table_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(RESULT, Console(width=110))
    printed = capsys.readouterr().out
    for line in ("generation, over vLLM", "30.0", "40.0", "0.75", "TRL's default over", "3.00", "peak 4.0 GB", "27.5"):
        assert line in printed
    draw(RESULT, tmp_path / "real.png")
    assert (tmp_path / "real.png").read_bytes().startswith(b"\x89PNG")


def test_the_order_of_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock TRL's best batch is the faster one, and every ratio is of one run."""
    found: dict[str, dict[str, Any]] = {
        "score": {"sums": [1.0, 2.0], "seconds": 2.0},
        "score_trl": {"sums": [1.0, 2.5], "seconds": 6.0},
        "train": {
            "seconds": 4.0, "share_of_matrix_rate": 0.5, "matmul_gflops": 1.0, "peak_gb": 1.0, "step0_loss": 0.69,
            "losses": [0.69], "model": "trained",
        },
    }  # fmt: skip
    took = {1: 8.0, 8: 12.0}
    calls: list[tuple[str, int, dict[str, str] | None]] = []

    def way(name: str, folder: Path, number: int = 1, variables: dict[str, str] | None = None) -> dict[str, Any]:
        calls.append((name, number, variables))
        costs = {"seconds": took[number], "peak_gb": float(number), "losses": [0.69]}
        return (found.get(name) or costs) | {"process": {"of": variables}}

    def generate(folder: Path, prompts: Path, engine: str, out: str, variables: Any = None) -> real.Ended:
        return real.Ended("", {"transformers": 3.0, "vllm": 4.0, "glibc": 9.0}[out], 1.0, 2.0)

    monkeypatch.setattr(real, "way", way)
    monkeypatch.setattr(real, "generate", generate)
    monkeypatch.setattr(real, "allocator_settings", lambda environment: {"of": "stages"})
    monkeypatch.setattr(real, "prepare", lambda folder, pairs: None)
    monkeypatch.setattr(real, "add_reference", lambda folder: None)
    monkeypatch.setattr(real, "measure_plan", lambda folder, prompts, policy: {"planned_over_taken": 1.0, "of": policy})
    monkeypatch.setattr(real, "resolve_model", lambda name, revision, role: tmp_path)
    monkeypatch.setattr(real, "show", lambda result, console: None)
    monkeypatch.setattr(real, "draw", lambda result, path: None)
    real.main(["--model", "tiny", "--count", "2", "--pairs", "2", "--out", str(tmp_path / "out")])
    result = json.loads((tmp_path / "out" / "real.json").read_text(encoding="utf-8"))
    training = result["training"]
    assert (training["trl_best_seconds"], training["trl_default_seconds"], training["trl_best_batch"]) == (8.0, 12.0, 1)
    assert (training["speedup_over_trl_best"], training["speedup_over_trl_default"]) == (2.0, 3.0)
    assert training["trl_best_peak_gb"] == 1.0
    assert result["generation"]["time_over_vllm"] == 0.75
    assert result["scoring"]["speedup_over_trl"] == 3.0
    assert result["scoring"]["largest_difference"] == 0.5
    assert result["plan"]["of"] == "trained"
    # Stock TRL with the settings of our processes, and our stages without them.
    assert ("train_trl", 1, {"of": "stages"}) in calls
    assert result["allocator"]["generate"]["glibc"]["seconds"] == 9.0
    assert result["allocator"]["train"]["glibc"] == {"of": real.DEFAULTS_OF_GLIBC}


@pytest.mark.slow
def test_training_has_the_losses_of_stock_trl(tmp_path: Path) -> None:
    policy = make_llama(tmp_path / "model")
    stage = Stage(policy, tmp_path / "transformers")
    stage(CONFIG.model_copy(update={"samples": real.SAMPLES}), prompts=questions(4))
    real.prepare(tmp_path, 16)
    real.add_reference(tmp_path)
    pairs = pl.read_parquet(tmp_path / "training_set.parquet")
    assert 8 <= pairs.height <= 16
    ours = real_ways.train(tmp_path, "train", 1)
    assert ours["step0_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert 0 < ours["share_of_matrix_rate"] < 1
    assert Path(ours["model"]).is_dir()
    stock = real_ways.train_trl(tmp_path, "train_trl", 8)
    assert stock["losses"][0] == pytest.approx(ours["losses"][0], abs=1e-3)
