"""The bench of audits: both ways give the same rewards, and others end it. No duration is asserted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import audit
import pytest

SMALL = ["--shape=tiny", "--pairs=5", "--batch=2", "--prompt-median=6", "--response-median=6", "--longest=20"]


def test_both_ways_agree_and_results_are_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DICE_CACHE", str(tmp_path / "cache"))
    audit.main([*SMALL, f"--out={tmp_path}"])
    results = json.loads((tmp_path / "audit.json").read_text())
    assert results["worst_relative_difference"] <= audit.TOLERANCE
    assert results["accuracy"]["audit"] == results["accuracy"]["rewardbench"]
    assert 0 < results["forward_processor_seconds"] < results["processor_seconds"]["audit"]
    assert results["audit_over_forwards"] > 1
    assert results["response_tokens"]["sum"] > 10
    for kind in ("seconds", "processor_seconds"):
        assert all(value > 0 for value in results[kind].values())


def test_other_rewards_end_the_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DICE_CACHE", str(tmp_path / "cache"))
    plain = audit.rewardbench_way

    def wrong(*arguments: Any) -> dict[str, Any]:
        found = plain(*arguments)
        found["rewards"][1][2] += 0.1
        return found

    monkeypatch.setattr(audit, "rewardbench_way", wrong)
    with pytest.raises(SystemExit, match="differ by more than rounding"):
        audit.main([*SMALL, f"--out={tmp_path}"])
    assert not (tmp_path / "audit.json").exists()
