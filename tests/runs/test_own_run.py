"""A run of one round on a user's own tiny models: its files, its metrics, what a resume repeats, what a kill costs."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import torch
from own_run import KEPT, PROMPTS, SAMPLES, STAGE_NAMES, STEPS, Events, frames, no_worker, only_preflight
from places import child_environment
from polars.testing import assert_frame_equal
from processes import PATIENCE, left_in_session, wait_for
from safetensors.torch import load_file

from dice_py.config.loading import dump, load_resolved
from dice_py.config.run import RunConfig
from dice_py.errors import UsageError
from dice_py.reporting.html import write_report
from dice_py.runs import folder as run_folder
from dice_py.runs import loop
from dice_py.runs.status import run_status
from dice_py.stages.registry import ROUND_STAGES
from dice_py.storage.files import read_json
from dice_py.storage.parquet import parquet_key

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def complete_run(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run of one round. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "complete"
    events = Events()
    metrics = loop.run(config, folder, events, after_round=write_report)
    assert list(metrics) == ["round-01"]
    assert events.stages() == [(name, status) for name in STAGE_NAMES for status in ("running", "done")]
    return folder


@pytest.fixture
def copy(complete_run: Path, tmp_path: Path) -> Path:
    """A copy of `complete_run`, to change."""
    return shutil.copytree(complete_run, tmp_path / "copy")


def test_the_folder_of_a_run(config: RunConfig, complete_run: Path) -> None:
    assert load_resolved(complete_run / "config.yaml") == config
    for name in ("manifest.json", "events.jsonl", "report.html", "inputs/prompts.parquet", "inputs/offline.parquet"):
        assert (complete_run / name).stat().st_size > 0
    assert sorted(path.name for path in (complete_run / "round-01").iterdir()) == sorted(ROUND_STAGES)
    assert not list(complete_run.rglob("*.tmp"))
    events = [json.loads(line) for line in (complete_run / "events.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "finished"
    assert all(event["event"] != "progress" for event in events)
    (profiled,) = read_json(complete_run / "profile.json")["rounds"]
    assert [stage["stage"] for stage in profiled["stages"]] == STAGE_NAMES


def test_the_manifest_names_complete_files_with_their_keys(complete_run: Path) -> None:
    stages = read_json(complete_run / "manifest.json")["stages"]
    assert list(stages) == STAGE_NAMES
    for name, entry in stages.items():
        assert entry["status"] == "done"
        assert entry["seconds"] >= 0
        assert entry["files"]
        for made in entry["files"]:
            path = complete_run / made["file"]
            if path.suffix == ".parquet":
                assert parquet_key(path) == made["key"], name
            elif path.is_dir():
                assert read_json(path / "dice.json")["key"] == made["key"]
            else:
                assert path.is_file()
    assert [len(stages[f"round-01/{name}"]["files"]) for name in ("generate", "score")] == [3, 3]


def test_what_the_stages_made_fits_together(complete_run: Path) -> None:
    generations, scores = (
        frames(complete_run, "generate/generations-*.parquet"),
        frames(complete_run, "score/*.parquet"),
    )
    prompts = pl.read_parquet(complete_run / "inputs/prompts.parquet")
    assert generations.height == scores.height == prompts.height * SAMPLES == (PROMPTS - 2) * SAMPLES
    difference = (scores["logp"] - scores["ref_logp"]) * 0.1
    assert (difference - scores["reward"]).abs().max() < 1e-4
    mined, training = frames(complete_run, "mine/*.parquet"), frames(complete_run, "replay/training_set.parquet")
    sources = dict(training["source"].value_counts().iter_rows())
    assert sources == {"mined": mined.height, "replay": mined.height}  # γ is one half
    from_mined = training.filter(pl.col("source") == "mined")
    assert sorted(from_mined["ref_chosen_logps"]) == sorted(scores["logp"].gather(mined["chosen_row"]))
    counts = read_json(complete_run / "manifest.json")["stages"]["round-01/train"]["counts"]
    assert counts["steps"] == STEPS
    assert abs(counts["step0_loss"] - math.log(2)) < 1e-3


def test_the_pairs_to_read(complete_run: Path) -> None:
    training, pairs = frames(complete_run, "replay/training_set.parquet"), frames(complete_run, "inspect/pairs.parquet")
    counts = read_json(complete_run / "manifest.json")["stages"]["round-01/inspect"]["counts"]
    assert (counts["pairs"], pairs.height) == (training.height, training.height)  # fewer than report.pairs
    assert counts.keys() == {"pairs", "sources", "tokens", "largest_difference", "reward_std"}
    assert counts["largest_difference"] < 1e-4 * counts["reward_std"]
    of_mined = pairs.filter(pl.col("source") == "mined")
    assert of_mined["candidates"].list.len().unique().to_list() == [SAMPLES]
    distributions = read_json(complete_run / "round-01/inspect/distributions.json")
    assert (distributions["rows"], sum(distributions["margins"]["counts"])) == (
        (PROMPTS - 2) * SAMPLES,
        of_mined.height,
    )


def test_the_metrics_of_a_round(complete_run: Path) -> None:
    metrics = read_json(complete_run / "round-01/evaluate/metrics.json")
    assert {
        "mean_response_tokens",
        "start_mean_response_tokens",
        "implicit_reward_accuracy",
        "length_only_accuracy",
    } <= set(metrics)
    assert "oracle_win_rate" not in metrics  # only the world has an oracle
    assert (metrics["eval_prompts"], metrics["eval_samples"]) == (2, 1)
    assert 0.0 <= metrics["implicit_reward_accuracy"] <= 1.0


def test_held_out_rows_are_not_trained_on(complete_run: Path) -> None:
    def said(name: str, column: str) -> set[str]:
        frame = pl.read_parquet(complete_run / "inputs" / f"{name}.parquet")
        return {messages[-1]["content"] for messages in frame[column].to_list()}

    assert not said("prompts", "messages") & said("eval_prompts", "messages")
    assert len(said("eval_prompts", "messages")) == 2
    assert not said("offline", "prompt") & said("eval_pairs", "prompt")
    assert len(said("eval_pairs", "prompt")) == 3


def test_status_of_a_finished_run(complete_run: Path) -> None:
    found = run_status(complete_run)
    assert (found["state"], found["done"], found["stages"]) == ("finished", 7, 7)
    assert [(entry["stage"], entry["status"]) for entry in found["entries"]] == [(n, "done") for n in STAGE_NAMES]
    assert found["entries"][0]["counts"]["responses"] == (PROMPTS - 2) * SAMPLES


# What is made again


def test_a_second_run_keeps_everything(
    config: RunConfig, copy: Path, complete_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "run_in_subprocess", no_worker)
    events = Events()
    metrics = loop.run(config, copy, events)
    assert metrics == {"round-01": read_json(complete_run / "round-01/evaluate/metrics.json")}
    assert events.stages() == KEPT


def test_a_run_of_another_config_is_refused(config: RunConfig, copy: Path) -> None:
    with pytest.raises(UsageError, match="holds a run of another config"):
        loop.run(config.model_copy(update={"seed": 1}), copy)


def test_a_lost_shard_is_made_again_alone(copy: Path, complete_run: Path) -> None:
    lost, kept = (copy / f"round-01/score/scores-{number:05d}.parquet" for number in (1, 2))
    lost.unlink()
    before = kept.stat().st_mtime_ns
    events = Events()
    loop.resume(copy, events)
    # The same shard comes back under the same key: what was made from it still holds.
    redone = [("round-01/score", "running"), ("round-01/score", "done")]
    assert events.stages() == [KEPT[0], *redone, *KEPT[2:]]
    assert [fields["file"] for event, fields in events.events if event == "shard"] == [lost.name]
    assert kept.stat().st_mtime_ns == before
    assert_frame_equal(frames(copy, "score/*.parquet"), frames(complete_run, "score/*.parquet"), check_exact=True)


def test_what_depends_on_a_changed_key_is_made_again(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "run_in_subprocess", only_preflight)
    events = Events()
    with pytest.raises(AssertionError, match="replay:ReplayJob"):
        loop.resume(copy, events, assignments=["mine.debias=none"])
    redone = [("round-01/mine", "running"), ("round-01/mine", "done"), ("round-01/replay", "running")]
    assert events.stages() == [*KEPT[:2], *redone]
    notes = [fields["text"] for event, fields in events.events if event == "note"]
    assert "settings changed: mine.debias: linear → none" in notes
    assert "round-01/mine is made again (the first stage that is), because of: mine.debias: linear → none" in notes
    assert "round-01/replay is made again, because of: pairs" in notes
    assert load_resolved(copy / "config.yaml").mine.debias == "none"


# --- kills


KILLED = """
import os, signal, sys
from cli.main import main
from dice_py.runs.folder import Run
from dice_py.stages.mine import MineJob

stage, event, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
del sys.argv[1:4]
now, seen = None, 0
tell, mine = Run.report, MineJob.run

def report(self, kind, /, **fields):
    global now, seen
    tell(self, kind, **fields)
    if kind == "stage" and fields["status"] == "running":
        now = fields["stage"]
    if (now, kind) == (stage, event):
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


def session_ends(session: int) -> bool:
    return wait_for(lambda: not left_in_session(session))


KILLS = [
    ("generate", "shard", 1, "generate/generations-*.parquet"),
    ("score", "shard", 1, "score/scores-*.parquet"),
    ("mine", "-", 1, "mine/mined.parquet"),
    ("train", "progress", 3, "train/checkpoints/checkpoint-2/dice.json"),
]
"""Stage, event, at which of these events of the stage, and what must then be there."""


@pytest.mark.parametrize(
    "kills",
    [[KILLS[0], KILLS[-1]], pytest.param(KILLS, marks=pytest.mark.long)],
    ids=["sampling and training", "every stage"],
)
def test_a_run_that_was_killed_ends_as_an_unkilled_one(
    complete_run: Path, tmp_path: Path, kills: list[tuple[str, str, int, str]]
) -> None:
    folder = tmp_path / "killed"
    asked = ["run", "-c", str(complete_run / "config.yaml"), "--run-dir", str(folder)]
    written: dict[Path, int] = {}
    for stage, event, number, name in kills:
        command = [sys.executable, "-c", KILLED, f"round-01/{stage}", event, str(number), *asked]
        with (tmp_path / "output").open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=output, env=child_environment(), start_new_session=True
            )
            assert process.wait(300) == -signal.SIGKILL, (tmp_path / "output").read_text()
        assert session_ends(process.pid)
        at = ROUND_STAGES.index(stage)
        statuses = [entry["status"] for entry in run_status(folder)["entries"]]
        assert statuses == ["done"] * at + ["stopped"] + ["to do"] * (len(ROUND_STAGES) - 1 - at)
        left = sorted((folder / "round-01").glob(name))
        assert left
        if event == "shard":
            assert len(left) < 3
            written |= {file: file.stat().st_mtime_ns for file in left}
        asked = ["resume", str(folder)]

    events = Events()
    loop.resume(folder, events)
    redone = [(name, status) for name in STAGE_NAMES[5:] for status in ("running", "done")]
    assert events.stages() == [*KEPT[:5], *redone]
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


PREEMPTED = """
import os, signal
from cli.main import main
from dice_py.runs.folder import Run

tell = Run.report

def report(self, kind, /, **fields):
    tell(self, kind, **fields)
    if (kind, fields.get("stage"), fields.get("done")) == ("progress", "train", 2):
        os.killpg(0, signal.SIGUSR1)

Run.report = report
main()
"""
"""`dice …`, whose whole process group gets SIGUSR1, as Slurm sends it to a job step, after the second training step."""


@pytest.mark.long
def test_a_signal_ahead_of_a_preemption_loses_no_step_of_training(copy: Path, tmp_path: Path) -> None:
    asked = ["resume", str(copy), "--set", "train.num_train_epochs=20", "--set", "train.save_steps=1000"]
    with (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(
            [sys.executable, "-c", PREEMPTED, *asked],
            stdout=subprocess.DEVNULL, stderr=err, env=child_environment(), start_new_session=True,
        )  # fmt: skip
    assert process.wait(300) == 5
    assert session_ends(process.pid)
    said = (tmp_path / "err").read_text().strip().splitlines()[-1]
    sentence = r"error: interrupted; the training has written its checkpoint of step (\d+) of (\d+)\. Continue with: "
    found = re.fullmatch(sentence + re.escape(f"dice resume {copy}"), said)
    assert found is not None, said
    step, steps = map(int, found.groups())
    assert 2 <= step < steps
    assert run_status(copy)["state"] == "stopped"

    events = Events()
    loop.resume(copy, events)
    done = [f["done"] for event, f in events.events if event == "progress" and f["stage"] == "train"]
    assert done == list(range(step + 1, steps + 1))


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
