"""The bench of stage 2 of MPO: the same work in a step and in its parts. No duration is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import reinforcement as bench

SMALL = [
    "--steps=2", "--batch=4", "--num-generations=2", "--micro-batch=2", "--mean-length=8", "--longest=16",
    "--prompt=8", "--repeats=1", "--kl-beta=0.05", "--threads=1",
]  # fmt: skip


@pytest.mark.slow
def test_results_are_complete(tmp_path: Path) -> None:
    assert bench.main([*SMALL, f"--out={tmp_path}"]) == 0
    results = json.loads((tmp_path / "reinforcement-kl.json").read_text())
    seconds = results["seconds"]
    assert bench.parts_of(seconds) == ["sampling", "rewards", "update", "kl"]
    assert all(seconds[part] > 0 for part in bench.parts_of(seconds))
    assert results["ratio"] == pytest.approx(bench.ratio(seconds))
    assert seconds["first_rms_difference"] < 1e-3
    assert 1 <= seconds["tokens"] <= 16


@pytest.mark.slow
def test_other_responses_end_the_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = bench.ends_of_steps

    def with_other_seeds(trainer: bench.OnPolicy) -> list[float]:
        ends = measured(trainer)
        sampler = trainer.rollouts.sampler
        sample = type(sampler).sample
        monkeypatch.setattr(
            type(sampler), "sample", lambda self, prompts, seeds: sample(self, prompts, [seed + 1 for seed in seeds])
        )
        return ends

    monkeypatch.setattr(bench, "ends_of_steps", with_other_seeds)
    with pytest.raises(SystemExit, match="the responses are others when they are sampled again"):
        bench.main([*SMALL, f"--out={tmp_path}"])
    assert list(tmp_path.iterdir()) == []
