"""The README's Python, run on made-up files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = [block.split("```")[0] for block in README.read_text(encoding="utf-8").split("```python\n")[1:]]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    random = np.random.default_rng(0)
    rows = 4000
    prompt = np.arange(rows) // 8
    scored = pl.DataFrame(
        {
            "prompt_id": prompt,
            "prompt": [f"question {p}" for p in prompt],
            "response": [f"answer {p} {i}" for p, i in zip(prompt, random.integers(0, 30, rows), strict=True)],
            "response_tokens": random.integers(5, 400, rows),
            "reward": random.normal(size=rows),
            "round": random.integers(1, 3, rows),
        }
    )
    (tmp_path / "scored").mkdir()
    for i, part in enumerate(scored.iter_slices(1500)):
        part.write_parquet(tmp_path / "scored" / f"part-{i}.parquet")
    offline = pl.DataFrame(
        {
            "prompt_id": np.arange(490, 1490),
            "prompt": [f"question {p}" for p in range(490, 1490)],
            "chosen": ["good"] * 1000,
            "rejected": ["bad"] * 1000,
            "margin": random.normal(size=1000),
        }
    )
    offline.write_parquet(tmp_path / "offline.parquet")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_is_python_in_the_readme() -> None:
    assert len(BLOCKS) == 1
    assert sum(bool(line.strip()) for line in BLOCKS[0].splitlines()) <= 13


def test_from_a_scan_to_a_training_set(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(BLOCKS[0], "README.md", "exec"), {})
    assert "duplicate" in capsys.readouterr().out
    made = pl.read_parquet(files / "training_set.parquet")
    assert made.columns == ["prompt", "chosen", "rejected"]
    # As many offline pairs as mined ones, and none on a prompt that was mined.
    replayed = made.filter(pl.col("chosen") == "good")
    mined = made.filter(pl.col("chosen") != "good")
    assert mined.height == 500
    assert 400 < replayed.height <= 500
    assert not set(mined["prompt"]) & set(replayed["prompt"])
    own = pl.col("chosen").str.split(" ").list.get(1)
    assert mined.select((pl.format("question {}", own) == pl.col("prompt")).all()).item()
