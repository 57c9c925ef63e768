"""The round on paper: more GPUs take less time, and a larger share of them is idle."""

from __future__ import annotations

import json
from pathlib import Path

import cluster
import pytest


def test_where_it_stops_to_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.main([f"--out={tmp_path}", "--gpus", "8", "64", "512"])
    rows = json.loads((tmp_path / "cluster.json").read_text())["rows"]
    hours = [row["hours"] for row in rows]
    assert hours == sorted(hours, reverse=True)
    assert hours[0] < 8 * hours[1] < 64 * hours[2]
    idle = [row["idle_share"] for row in rows]
    assert 0 <= idle[0] < idle[1] < idle[2] < 1
    assert rows[0]["network_bytes"] == 0  # one node
    assert len({round(row["disk_tb"], 6) for row in rows}) == 1
    assert capsys.readouterr().out.count("GPUs: ") == 3


@pytest.mark.long
def test_what_is_assumed_matters(tmp_path: Path) -> None:
    def hours(*options: str) -> float:
        cluster.main([f"--out={tmp_path}", "--gpus", "64", *options])
        (row,) = json.loads((tmp_path / "cluster.json").read_text())["rows"]
        return float(row["hours"])

    usual = hours()
    for slower in (("--sampling", "4000"), ("--network", "10"), ("--filesystem", "1")):
        assert hours(*slower) > usual
