"""What a kill costs: a run that was killed in every stage ends with the results of one that was not."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from own_run import KEPT, STAGE_NAMES, Events, frames
from places import child_environment
from polars.testing import assert_frame_equal
from processes import PATIENCE, wait_for
from safetensors.torch import load_file

from dice_py.config.loading import dump
from dice_py.config.run import RunConfig
from dice_py.runs import loop
from dice_py.runs.status import run_status
from dice_py.stages.registry import ROUND_STAGES
from dice_py.storage.files import read_json

pytestmark = pytest.mark.slow


KILLED = """
import os, signal, sys
from cli.main import main
from dice_py.runs.folder import Run
from dice_py.stages.mine import MineJob

stage, event, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
del sys.argv[1:4]
now, seen = None, 0
tell, mine = Run.report, MineJob.run

def report(self, name, **fields):
    global now, seen
    tell(self, name, **fields)
    if name == "stage" and fields["status"] == "running":
        now = fields["stage"]
    if (now, name) == (stage, event):
        seen += 1
        if seen == number:
            os.killpg(0, signal.SIGKILL)

def mine_and_die(job, report):
    mine(job, report)
    os.killpg(0, signal.SIGKILL)

Run.report = report
if stage.endswith("/mine"):
    MineJob.run = mine_and_die
main()
"""
"""`dice …`, whose whole process group is killed at the given event of the given stage (mine: when its files
are written and the manifest does not name them yet)."""


def left_in_session(session: int) -> list[int]:
    """Processes of a session that are not yet gone."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, leader = stat.read_text().rpartition(")")[2].split()[:4]
            if int(leader) == session and state not in "ZX":
                found.append(int(stat.parent.name))
    return found


def session_ends(session: int) -> bool:
    return wait_for(lambda: not left_in_session(session))


KILLS = [
    ("generate", "shard", 1, "generate/generations-*.parquet"),
    ("score", "shard", 1, "score/scores-*.parquet"),
    ("mine", "-", 1, "mine/mined.parquet"),
    ("train", "progress", 3, "train/checkpoints/checkpoint-2/dice.json"),
]
"""Stage, event, at which of these events of the stage, and what must then be there."""


def test_a_run_that_was_killed_in_every_stage_ends_as_an_unkilled_one(complete_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    asked = ["run", "-c", str(complete_run / "config.yaml"), "--run-dir", str(folder)]
    written: dict[Path, int] = {}
    for stage, event, number, name in KILLS:
        command = [sys.executable, "-c", KILLED, f"round-01/{stage}", event, str(number), *asked]
        with (tmp_path / "output").open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=output, env=child_environment(), start_new_session=True
            )
            assert process.wait(300) == -signal.SIGKILL, (tmp_path / "output").read_text()
        assert session_ends(process.pid)
        at = ROUND_STAGES.index(stage)
        statuses = [entry["status"] for entry in run_status(folder)["entries"]]
        assert statuses == ["done"] * at + ["stopped"] + ["to do"] * (5 - at)
        left = sorted((folder / "round-01").glob(name))
        assert left
        if event == "shard":
            assert len(left) < 3
            written |= {file: file.stat().st_mtime_ns for file in left}
        asked = ["resume", str(folder)]

    events = Events()
    loop.resume(folder, events)
    redone = [(name, status) for name in STAGE_NAMES[4:] for status in ("running", "done")]
    assert events.stages() == [*KEPT[:4], *redone]
    notes = [fields["text"] for event, fields in events.events if event == "note"]
    assert any(note.startswith("training resumes from checkpoint-") for note in notes)
    # A shard that was whole when the kill came is never written again.
    assert {file: file.stat().st_mtime_ns for file in written} == written

    runs = (folder, complete_run)
    for pattern in ("generate/generations-*", "score/*", "mine/*", "replay/training_set*"):
        ours, theirs = (frames(run, f"{pattern}.parquet").drop("sampled_logp", strict=False) for run in runs)
        assert_frame_equal(ours, theirs, check_exact=True)
    model = "round-01/train/model/model.safetensors"
    weights, unkilled = load_file(folder / model), load_file(complete_run / model)
    assert weights.keys() == unkilled.keys()
    assert all(torch.equal(weights[name], unkilled[name]) for name in weights)
    metrics = "round-01/evaluate/metrics.json"
    assert read_json(folder / metrics) == read_json(complete_run / metrics)
    assert not list(folder.rglob(".*.tmp"))
    assert run_status(folder)["state"] == "finished"


def test_sigterm_ends_a_run_that_can_go_on(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump(config))
    folder = tmp_path / "stopped"
    asked = ["run", "-c", str(tmp_path / "config.yaml"), "--run-dir", str(folder)]
    command = [sys.executable, "-c", "from cli.main import main; main()", *asked]
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=child_environment(), start_new_session=True)
    try:
        log = folder / "round-01/generate/worker.log"
        assert wait_for(lambda: log.exists() or process.poll() is not None, seconds=300)
        assert process.poll() is None
        assert len(left_in_session(process.pid)) > 1
        os.kill(process.pid, signal.SIGTERM)
        ended = (process.wait(PATIENCE), (tmp_path / "out").read_text())
    finally:
        process.kill()
    err = (tmp_path / "err").read_text()
    assert ended == (5, ""), err
    assert err.strip().splitlines()[-1].endswith(f"Continue with: dice resume {folder}")
    assert "Traceback" not in err
    assert session_ends(process.pid)
    assert run_status(folder)["state"] == "stopped"
    assert json.loads((folder / "events.jsonl").read_text().splitlines()[-1])["event"] == "interrupted"
