"""The bench of scoring: every way gives the sums of a plain forward, and the results hold what is named.

No time is asserted here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benches"))

import scoring
import scoring_ways

SMALL = ["--prompts=3", "--samples=4", "--prompt-median=20", "--response-median=12", "--longest=60", "--repeats=1"]


def test_all_ways_agree_and_results_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DICE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(scoring, "in_a_process", scoring.measure)
    scoring.main([*SMALL, f"--out={tmp_path}"])
    found = json.loads((tmp_path / "scoring.json").read_text())
    assert set(found["ways"]) == set(scoring_ways.WAYS)
    for way in found["ways"].values():
        assert way["worst_relative_difference"] <= scoring.FLOAT32_APART
        assert way["seconds"] > 0
        assert way["peak_memory_bytes"] > 0
    assert found["max_abs_difference"] == found["ways"]["ours"]["max_abs_difference"]
    slower = min(found["ways"][way]["seconds"] for way in ("trl_precompute", "trl_precompute_1"))
    assert found["speedup_over_trl_precompute"] == slower / found["ways"]["ours"]["seconds"]
    assert found["speedup_over_reference_way"] == found["ways"]["authors"]["seconds"] / found["ways"]["ours"]["seconds"]
    assert found["tokens"] < found["unshared_tokens"]  # prompts were shared


def test_sums_that_are_off_end_the_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def off(args: object, way: str) -> dict[str, object]:
        sums = [-50.0] * 12
        sums[3] -= 0.01 if way == "ours" else 0.0
        more = {"tokens": 1, "unshared_tokens": 2, "flops": 3, "token_budget": 4}
        memory = {"peak_memory_bytes": 5, "peak_memory_beyond_model_bytes": 6}
        return {"sums": sums, "seconds": 1.0, "matmul_flops_per_second": 1.0, **memory, **more}

    monkeypatch.setattr(scoring, "in_a_process", off)
    with pytest.raises(SystemExit, match="more than rounding: ours"):
        scoring.main([*SMALL, f"--out={tmp_path}"])
    assert not list(tmp_path.iterdir())
