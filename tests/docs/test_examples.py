"""The scripts of examples/, run as a reader would run them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from places import ROOT, child_environment

SMALL = {
    "world.sft_steps": 40,
    "world.offline_pairs": 200,
    "world.round_prompts": 200,
    "world.eval_prompts": 16,
    "world.eval_pairs": 40,
    "data.prompts_per_round": 60,
    "generate.samples": 4,
    "train.max_steps": 2,
    "evaluate.prompts": 16,
    "evaluate.samples": 2,
    "evaluate.pairs": 40,
}


def example(name: str, folder: Path, *options: str) -> str:
    """Runs an example in `folder`; what it printed."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *options],
        env=child_environment(DICE_CACHE=str(folder / "cache")),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_mining_made_up_scores(tmp_path: Path) -> None:
    printed = example("mine_scores.py", tmp_path)
    assert "no penalty:     chosen is +9" in printed  # hundreds of characters
    assert "chosen is -0.0 characters longer" in printed
    pairs = pl.read_parquet(tmp_path / "pairs.parquet")
    assert pairs.columns == ["prompt", "chosen", "rejected", "margin"]
    assert pairs.height == 2000
    assert (pairs["margin"] > 0).all()


def test_mining_scores_of_a_file(tmp_path: Path) -> None:
    scores = pl.DataFrame(
        {
            "prompt_id": [7, 7, 8, 8],
            "prompt": ["a", "a", "b", "b"],
            "response": ["a1", "a2", "b1", "b2"],
            "score": [0.5, 1.5, 3.0, 1.0],
            "response_chars": [10, 10, 20, 20],
        }
    )
    scores.write_parquet(tmp_path / "scores.parquet")
    assert "2 pairs in own.parquet" in example("mine_scores.py", tmp_path, "scores.parquet", "--out", "own.parquet")
    assert pl.read_parquet(tmp_path / "own.parquet").rows() == [("a", "a2", "a1", 1.0), ("b", "b1", "b2", 2.0)]


@pytest.mark.parametrize(("gamma", "replayed"), [("0.4", 400), ("0", 0)])
def test_mixing_replay(tmp_path: Path, gamma: str, replayed: int) -> None:
    example("mix_replay.py", tmp_path, "--gamma", gamma)
    training_set = pl.read_parquet(tmp_path / "training_set.parquet")
    counts = dict(training_set["source"].value_counts().iter_rows())
    # Three parts of the labeled pairs to one of the synthetic ones.
    assert counts == {"mined": 600} | ({"labeled": 300, "synthetic": 100} if replayed else {})
    assert training_set["prompt"].n_unique() == 600 + replayed


@pytest.mark.long
@pytest.mark.slow
def test_two_rounds(tmp_path: Path) -> None:
    options = [part for name, value in SMALL.items() for part in ("--set", f"{name}={value}")]
    printed = example("two_rounds.py", tmp_path, "--out", "run", *options)
    assert "round-02: win rate against the start" in printed
    for file in ("report.html", "round-02/train/model/config.json", "round-02/evaluate/metrics.json"):
        assert (tmp_path / "run" / file).is_file()


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.py")), ids=lambda file: file.stem)
def test_examples_are_short(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) < 60
