"""The bench of win rates: its sections, from drawn verdicts whose true figures are known. No time is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import winrate as bench
from verdicts import BASELINE, drawn, response_rows, write_jsonl


@pytest.mark.parametrize("suffix", [".json", ".csv"])
def test_bench(
    tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "COUNTS", (1, 3, 99))
    monkeypatch.setattr(bench, "RIDGES", (0.05, 0.2))
    _, truth = drawn(models=5, prompts=60)
    data = write_jsonl(tmp_path / "rows.jsonl", response_rows(models=5, prompts=60))
    official = tmp_path / f"official{suffix}"
    known = {name: value for name, value in truth.items() if name != "model-4"}
    if suffix == ".json":
        official.write_text(json.dumps({"length_controlled_winrate": known}))
    else:
        lines = [
            ",win_rate,length_controlled_winrate",
            *(f"{name},1.0,{value}" for name, value in known.items()),
            "x,1.0,",
        ]
        official.write_text("\n".join(lines))
    out = tmp_path / "out.json"
    arguments = ["--data", data, "--official", official, "--baseline", BASELINE, "--out", out]
    bench.main([*map(str, arguments), "--draws", "2", "--resamples", "5"])
    result = json.loads(out.read_text())
    assert result["official"]["models"] == 4
    assert result["official"]["fitted_models"] == 5
    for model in result["official"]["by_model"]:
        assert model["difference"] == pytest.approx(model["length_controlled_win_rate"] - known[model["model"]])
    assert result["official"]["mean_absolute"] < result["official"]["raw"]["mean_absolute"]
    assert set(result["ridge"]) == {"0.05", "0.2"}
    assert all(0 < value < 1 for ridge in result["ridge"].values() for value in ridge.values())
    assert [row["models"] for row in result["models"]] == [1, 3]
    assert result["models"][0]["with_its_difficulty"] is None
    assert result["models"][1]["with_its_difficulty"]["models"] > 0
    assert result["intervals"]["mean_width_fitted_again"] > 0
    assert "mean absolute difference" in capsys.readouterr().out
