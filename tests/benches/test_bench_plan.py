"""The bench of the plan: its ratios, and the commands that it runs. No time is asserted."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import plan as bench
import pytest

from dice_py.storage.files import Manifest

STAGES = {"round-01/generate": 4.0, "round-01/mine": 0.5}


def planned(factor: float, source: str) -> dict[str, Any]:
    stages = {name: {"seconds": factor * seconds} for name, seconds in STAGES.items()}
    return {"total_seconds": factor * 5.0, "stages": stages, "calibration": {"source": source}}


def make_run(folder: Path) -> None:
    folder.mkdir()
    manifest = Manifest(folder / "manifest.json")
    for name, seconds in STAGES.items():
        manifest.record(name, status="done", seconds=seconds)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[list[str], Path]]:
    """Replaces `dice`; the arguments and the cache of each call."""
    calls: list[tuple[list[str], Path]] = []
    monkeypatch.setenv("DICE_CACHE", str(tmp_path / "users"))
    (tmp_path / "users" / "world").mkdir(parents=True)

    def dice(given: list[str], folder: Path, cache: Path) -> tuple[str, float]:
        calls.append((given, cache))
        if given[0] == "run":
            make_run(folder / "run")
        fresh = "--fresh" in given
        return json.dumps(planned(1.2 if fresh else 0.9, "measured" if fresh else "stored")), 5.0

    monkeypatch.setattr(bench, "dice", dice)
    monkeypatch.setattr(bench, "keep_costs", lambda run, cache: None)
    return calls


def test_ratios_and_results(called: list[tuple[list[str], Path]], tmp_path: Path) -> None:
    bench.main(["--rounds=1", "--set=seed=3", f"--out={tmp_path}"])
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["planned_over_true_total"] == pytest.approx({"fresh": 1.2, "stored": 0.9})
    assert found["true_total_seconds"] == 5.0
    mine = found["stages"]["round-01/mine"]
    assert (mine["true_seconds"], mine["fresh_over_true"]) == (0.5, pytest.approx(1.2))
    assert mine["stored_over_true"] == pytest.approx(0.9)
    assert {"cpu", "cores", "versions"} <= set(found["machine"])
    assert [given[0] for given, _ in called] == ["world", "plan", "run", "plan"]
    assert all({"--rounds=1", "--set=seed=3"} <= set(given) for given, _ in called[1:])
    # The run and the calibration have a cache each, and neither is the user's.
    users, planning, running, again = (cache for _, cache in called)
    assert users == tmp_path / "users"
    assert running == again != planning
    assert users not in (planning, running)
    assert not (users / "remembered.json").exists()


def test_a_plan_without_kept_costs_ends_the_bench(
    called: list[tuple[list[str], Path]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    faked = bench.dice

    def dice(given: list[str], folder: Path, cache: Path) -> tuple[str, float]:
        out, seconds = faked(given, folder, cache)
        return out.replace("stored", "measured"), seconds

    monkeypatch.setattr(bench, "dice", dice)
    with pytest.raises(SystemExit, match="did not use the costs"):
        bench.main([f"--out={tmp_path}"])
    assert not (tmp_path / "plan.json").exists()


def test_the_cache_has_only_the_worlds(tmp_path: Path) -> None:
    (tmp_path / "world" / "a").mkdir(parents=True)
    cache = bench.own_cache(tmp_path / "cache", tmp_path / "world")
    assert os.listdir(cache) == ["world"]  # noqa: PTH208
    assert (cache / "world" / "a").is_dir()
