"""`dice status`: one run, all runs, and damaged ones."""

from __future__ import annotations

import fcntl
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import contents

from dice_py.config.loading import dump, resolve
from dice_py.storage.files import Manifest

pytestmark = pytest.mark.usefixtures("empty_folder")


def made_run(folder: Path) -> Path:
    """A run of one round that was stopped while it scored."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump(resolve([], ["rounds=1"])))
    manifest = Manifest(folder / "manifest.json")
    counts = {"responses": 4800, "response_tokens": 31234, "cut_off": 3, "engine": "transformers"}
    manifest.record("round-01/generate", key="k", status="done", seconds=83.2, counts=counts, files=[])
    manifest.record("round-01/score", key="k", status="running", seconds=None, counts={}, files=[])
    return folder


def test_status_of_a_run(dice) -> None:
    folder = made_run(Path("runs/first"))
    before = contents(folder)
    code, out, err = dice("status", folder)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "runs/first: stopped, 1 of 7 stages"
    assert lines[1].split() == ["stage", "status", "time", "counts"]
    # A row is one line, however long.
    told = "responses 4,800, response tokens 31,234, cut off 3, engine transformers"
    assert re.fullmatch(rf"round-01/generate +done +1 min 23 s +{told}", lines[2])
    assert re.fullmatch(r"round-01/score +stopped +–", lines[3])
    assert [line.split()[:3] for line in lines[4:]] == [
        [f"round-01/{stage}", "to", "do"] for stage in ("mine", "replay", "inspect", "train", "evaluate")
    ]
    code, out, err = dice("status", folder, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["state"], found["done"], found["stages"]) == ("stopped", 1, 7)
    assert [entry["status"] for entry in found["entries"]] == ["done", "stopped"] + ["to do"] * 5
    assert found["entries"][0]["counts"]["responses"] == 4800
    assert contents(folder) == before


def test_status_while_a_process_works_there(dice) -> None:
    folder = made_run(Path("runs/first"))
    with (folder / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        found = json.loads(dice("status", folder, "--json")[1])
    assert found["state"] == "running"
    assert found["entries"][1]["status"] == "running"


def test_status_of_all_runs(dice) -> None:
    assert dice("status") == (0, "no runs under runs/\n", "")
    assert dice("status", "--json") == (0, "[]\n", "")
    made_run(Path("runs/first"))
    broken = made_run(Path("runs/second"))
    (broken / "manifest.json").write_text("{")
    code, out, _ = dice("status")
    assert code == 0
    assert out.splitlines() == ["runs/first  stopped  1/7 stages", "runs/second  unreadable  0/0 stages"]
    assert [run["state"] for run in json.loads(dice("status", "--json")[1])] == ["stopped", "unreadable"]


@pytest.mark.parametrize("broken", ["config.yaml", "manifest.json"])
def test_a_run_folder_that_was_damaged(refused, broken: str) -> None:
    folder = made_run(Path("runs/first"))
    (folder / broken).write_text("{")
    code, problem = (2, "is not valid YAML") if broken == "config.yaml" else (3, "is damaged")
    assert f"runs/first/{broken} {problem}" in refused(code, "status", folder)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
@pytest.mark.parametrize("name", ["config.yaml", "manifest.json"])
def test_what_is_no_file_in_the_place_of_one(dice, refused, name: str, kind: str) -> None:
    """It is never opened: a pipe would wait for a writer, and /dev/zero has no end."""
    path = made_run(Path("runs/first")) / name
    path.unlink()
    if kind == "device":
        path.symlink_to("/dev/zero")
    else:
        (os.mkfifo if kind == "pipe" else os.mkdir)(path)
    assert dice("status", "runs/first")[0] in (2, 3)
    assert dice("status")[0] == 0
    if kind != "folder":  # which is set aside
        assert name in refused(2, "resume", "runs/first")
    if name == "manifest.json":
        code, out, _ = dice("status", "runs/first", "--verify")
        assert code == 3
        assert "runs/first/manifest.json" in out.splitlines()


@pytest.mark.parametrize(
    "stages", [{"round-01/mine": None}, {"round-01/mine": {"files": [{}]}}, {"round-01/mine": {"files": None}}]
)
def test_a_manifest_of_other_types_is_a_damaged_one(refused, stages: dict[str, object]) -> None:
    folder = made_run(Path("runs/first"))
    manifest = Manifest(folder / "manifest.json")
    manifest.data["stages"] = stages
    manifest.save()
    assert "manifest.json is damaged" in refused(3, "status", folder)


def test_a_damaged_adapter_is_told_apart(dice: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume makes a model again, and its adapter with it; not the adapter alone."""
    damaged = ["round-01/mine/mined.parquet", "round-01/train/adapter/adapter_model.safetensors"]
    found = {"damaged": damaged, "missing": [], "files": 2, "bytes": 10}
    monkeypatch.setattr("dice_py.runs.verify.verify_run", lambda folder: found)
    code, out, err = dice("status", tmp_path, "--verify")
    assert (code, out.splitlines()) == (3, damaged)
    assert "makes them again, but for the 1 of adapters: delete that round's train folder" in err
