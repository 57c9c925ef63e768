"""What may not be read is not damaged; what a killed process left is removed; too little memory is no damage either."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dice_py.errors import OutOfMemoryError
from dice_py.mining.files import mine_files
from dice_py.runs.status import list_runs
from dice_py.storage import integrity
from dice_py.storage.files import Manifest, remove_leftovers
from dice_py.storage.integrity import damaged_in, write_stamp
from dice_py.storage.parquet import read_parquet


def denied(*_: Any, **__: Any) -> None:
    raise PermissionError(13, "Permission denied", "a file")


def test_a_manifest_that_may_not_be_read_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be set aside, and the run made again."""
    Manifest(tmp_path / "manifest.json").record("round-01/mine", status="done")
    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(PermissionError):
        Manifest(tmp_path / "manifest.json")


def test_weights_that_may_not_be_read_are_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    write_stamp(tmp_path, {"key": "k"})
    (tmp_path / "b").unlink()
    assert damaged_in(tmp_path) == [tmp_path / "b"]
    monkeypatch.setattr(integrity, "content_digest", denied)
    with pytest.raises(PermissionError):
        damaged_in(tmp_path)


def test_one_run_that_may_not_be_read_does_not_hide_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("rounds: 1\n")
    monkeypatch.setattr("dice_py.runs.status.run_status", denied)
    assert [(Path(run["run"]).name, run["state"]) for run in list_runs(tmp_path)] == [
        ("a", "unreadable"),
        ("b", "unreadable"),
    ]
    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(PermissionError):
        list_runs(tmp_path)


def test_leftovers_of_processes_that_are_gone(tmp_path: Path) -> None:
    dead, own = int(Path("/proc/sys/kernel/pid_max").read_text()) + 1, os.getpid()
    gone = [f".a.parquet.{dead}.tmp", f".model.{dead}.tmp"]
    kept = [f".a.parquet.{own}.tmp", "a.parquet", ".a.tmp", f".a.parquet.{dead}.tmp.txt", f"a.{dead}.tmp"]
    for name in (*gone, *kept):
        (tmp_path / name).write_text("half")
    remove_leftovers(tmp_path, "a.parquet")
    assert not (tmp_path / gone[0]).exists()
    assert (tmp_path / gone[1]).exists()
    remove_leftovers(tmp_path)
    remove_leftovers(tmp_path / "absent")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_too_little_memory_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise pa.ArrowMemoryError("malloc of size 4194304 failed")

    file = tmp_path / "a.parquet"
    pl.DataFrame({"prompt_id": [1, 1], "reward": [0.5, 0.25], "response_tokens": [3, 4]}).write_parquet(file)
    monkeypatch.setattr(pq, "ParquetFile", full)
    with pytest.raises(OutOfMemoryError, match="not enough memory to read it"):
        read_parquet(file)
    monkeypatch.setattr("pyarrow.dataset.dataset", full)
    with pytest.raises(OutOfMemoryError, match="not enough memory to read it; lower --memory"):
        mine_files([str(file)], tmp_path / "out.parquet")
