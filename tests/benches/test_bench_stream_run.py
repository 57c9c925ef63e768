"""The bench of the mine and replay stages on a small round. No duration is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import stream_run


@pytest.mark.slow
@pytest.mark.long
def test_both_stages_are_measured(tmp_path: Path) -> None:
    out = tmp_path / "results"
    stream_run.main(["--rows=1600", f"--folder={tmp_path}", f"--out={out}"])
    results = json.loads((out / "stream-run.json").read_text())
    assert (results["rows"], results["mine"]["rows"], results["mine"]["pairs"]) == (1600, 1600, 100)
    assert 95 <= results["replay"]["pairs"] <= 100  # without those of equal answers: each is one of 32,000 tokens
    assert min(results[step]["seconds"] for step in ("mine", "replay")) > 0
    # The process that mines has neither torch nor what the bench itself has in memory; the other has torch.
    assert 0 < results["mine"]["peak_resident_gib"] < 0.4 < results["replay"]["peak_resident_gib"]
    assert list(tmp_path.iterdir()) == [out]
