"""The scoring bench: every way returns the sums of a plain forward, and the results file is complete.

No duration is asserted.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import scoring
import scoring_ways

SMALL = ["--prompts=3", "--samples=4", "--prompt-median=20", "--response-median=12", "--longest=60", "--repeats=1"]


def test_all_ways_agree_and_results_are_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DICE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(scoring, "measure_in_subprocess", scoring.measure)
    scoring.main([*SMALL, f"--out={tmp_path}"])
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
    def wrong(args: object, way: str) -> dict[str, object]:
        sums = [-50.0] * 12
        sums[3] -= 0.01 if way == "ours" else 0.0
        more = {"tokens": 1, "unshared_tokens": 2, "flops": 3, "token_budget": 4}
        memory = {"peak_memory_bytes": 5, "peak_memory_beyond_model_bytes": 6}
        return {"sums": sums, "seconds": 1.0, "matmul_flops_per_second": 1.0, **memory, **more}

    monkeypatch.setattr(scoring, "measure_in_subprocess", wrong)
    with pytest.raises(SystemExit, match="more than rounding: ours"):
        scoring.main([*SMALL, f"--out={tmp_path}"])
    assert not list(tmp_path.iterdir())
