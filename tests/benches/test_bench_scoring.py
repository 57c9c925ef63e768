"""The scoring bench: every way returns the sums of a plain forward, and the results file is complete.

No duration is asserted.
"""

from __future__ import annotations

import argparse
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import scoring
import scoring_ways
import shapes
import torch

SMALL = ["--prompts=3", "--samples=4", "--prompt-median=20", "--response-median=12", "--longest=60", "--repeats=1"]


@pytest.mark.long
def test_all_ways_agree_and_results_are_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DICE_CACHE", str(tmp_path / "cache"))
    asked: list[list[str]] = []

    def measure(args: argparse.Namespace, ways: list[str], repeats: int) -> dict[str, list[dict[str, Any]]]:
        asked.append(ways)
        assert repeats == args.repeats == 1
        return scoring.measure(args, ways)

    monkeypatch.setattr(scoring, "measure_in_subprocess", measure)
    scoring.main([*SMALL, f"--out={tmp_path}"])
    assert asked == [[way] for way in scoring_ways.WAYS]  # a process each
    results = json.loads((tmp_path / "scoring.json").read_text())
    assert set(results["ways"]) == set(scoring_ways.WAYS)
    for way in results["ways"].values():
        assert way["worst_relative_difference"] <= scoring.FLOAT32_TOLERANCE
        assert way["seconds"] > 0
        assert way["peak_memory_bytes"] > 0
    assert results["max_abs_difference"] == results["ways"]["ours"]["max_abs_difference"]
    trl = min(results["ways"][way]["seconds"] for way in ("trl_precompute", "trl_precompute_1"))
    assert results["speedup_over_trl_precompute"] == trl / results["ways"]["ours"]["seconds"]
    assert (
        results["speedup_over_reference_way"]
        == results["ways"]["authors"]["seconds"] / results["ways"]["ours"]["seconds"]
    )
    assert results["tokens"] < results["unshared_tokens"]  # prompts were shared


def test_wrong_sums_end_the_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(args: object, ways: list[str], repeats: int) -> dict[str, list[dict[str, Any]]]:
        (way,) = ways
        sums = [-50.0] * 12
        sums[3] -= 0.01 if way == "ours" else 0.0
        more = {"tokens": 1, "unshared_tokens": 2, "flops": 3, "token_budget": 4}
        memory = {"peak_memory_bytes": 5, "peak_memory_beyond_model_bytes": 6}
        return {way: [{"sums": sums, "seconds": 1.0, "matmul_flops_per_second": 1.0, **memory, **more}] * repeats}

    monkeypatch.setattr(scoring, "measure_in_subprocess", wrong)
    with pytest.raises(SystemExit, match="more than rounding: ours"):
        scoring.main([*SMALL, f"--out={tmp_path}"])
    assert not list(tmp_path.iterdir())


def test_a_large_model_is_made_once_for_all_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def make_model(shape: str, dtype: torch.dtype, device: str, seed: int) -> Any:
        made.append(shape)
        return shapes.make_model("tiny", dtype, device, seed)

    def measure(args: argparse.Namespace, ways: list[str], repeats: int) -> dict[str, list[dict[str, Any]]]:
        with monkeypatch.context() as patch:
            patch.setattr(scoring, "measure_once", once)
            patch.setitem(sys.modules, "shapes", types.SimpleNamespace(**{**vars(shapes), "make_model": make_model}))
            return scoring.measure(args, ways)

    def once(model: Any, way: str, prompts: object, responses: list[list[int]]) -> dict[str, Any]:
        order.append((way, model.dtype))
        sums = {"sums": [-50.0] * len(responses), "seconds": float(len(order))}
        more = dict.fromkeys(("tokens", "unshared_tokens", "flops", "token_budget", "peak_memory_bytes"), 1)
        return sums | more | {"peak_memory_beyond_model_bytes": 1}

    order: list[tuple[str, torch.dtype]] = []
    monkeypatch.setattr(scoring, "measure_in_subprocess", measure)
    scoring.main(["--shape=llama3-8b", "--dtype=bfloat16", *SMALL, "--repeats=2", f"--out={tmp_path}"])
    assert made == ["llama3-8b"]
    others = [(way, torch.bfloat16) for way in scoring_ways.WAYS if way != scoring.REFERENCE]
    assert order == [*others, *others, (scoring.REFERENCE, torch.float32)]
    results = json.loads((tmp_path / "scoring-llama3-8b.json").read_text())
    assert results["ways"]["ours"]["all_seconds"] == [1.0, len(others) + 1.0]


def test_trl_hashes_no_weights_and_computes_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from trl import DPOTrainer
    from trl.trainer import dpo_trainer

    passes: list[int] = []
    function = DPOTrainer.compute_ref_log_probs

    def counted(*arguments: Any) -> Any:
        passes.append(1)
        return function(*arguments)

    def hashed(module: object) -> str:
        raise AssertionError("the weights were hashed")

    monkeypatch.setattr(dpo_trainer, "hash_module", hashed)
    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", counted)
    model = shapes.make_model("tiny", num_hidden_layers=1, vocab_size=64, hidden_size=32, intermediate_size=32)
    first, second = (scoring_ways.trl_precompute(model, [[5, 6]] * 2, [[7, 8], [9]], batch=1) for _ in range(2))
    assert first.sums == second.sums
    assert len(passes) == 2
    assert dpo_trainer.hash_module is hashed
