"""The loop on a user's own tiny model: which reference a round has, what a run leaves, and what a kill costs.

The model is Mistral-shaped, with another template than the world's. One run is made once and left alone;
every test that changes a run does so in a copy.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from safetensors.torch import load_file
from tiny_models import make_llama, make_mistral

from dice_py.compute.worker import work_name
from dice_py.config.loading import dump, load_resolved, resolve
from dice_py.config.run import RunConfig
from dice_py.errors import UsageError
from dice_py.replay.buffer import ReplayBuffer
from dice_py.reporting.html import write_report
from dice_py.runs import folder as run_folder
from dice_py.runs import loop as rounds
from dice_py.runs.folder import Run
from dice_py.runs.status import run_status
from dice_py.scoring.pairs import score_pairs
from dice_py.stages.evaluate import EvaluateJob
from dice_py.stages.generate import GenerateJob
from dice_py.stages.job import Job, StageResult
from dice_py.stages.preflight import PreflightJob
from dice_py.stages.registry import ROUND_STAGES
from dice_py.stages.replay import ReplayJob
from dice_py.stages.score import ScoreJob
from dice_py.stages.train import TrainJob
from dice_py.storage.files import read_json, write_json
from dice_py.storage.keys import seed_for
from dice_py.storage.parquet import parquet_key, write_parquet
from dice_py.storage.schemas import GENERATIONS, SCORES

PROMPTS, PAIRS, SAMPLES, MAX_NEW, STEPS = 24, 30, 4, 64, 6
STAGE_NAMES = [f"round-01/{stage}" for stage in ROUND_STAGES]
SMALL = {
    "rounds": 1,
    "model": {"device": "cpu", "dtype": "float32"},
    "generate": {
        "engine": "transformers",
        "samples": SAMPLES,
        "max_new_tokens": MAX_NEW,
        "shard_prompts": 8,
    },
    # Sums that come with the samples differ in their last digits when a resume samples beside other rows.
    "score": {"policy_logps": "recompute"},
    "train": {
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "max_steps": STEPS,
        "save_steps": 2,
        "batch_size": 8,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
    },
    "evaluate": {"prompts": 2, "samples": 1, "pairs": 3},
}


class Told:
    """A listener that keeps what it was told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))

    def stages(self) -> list[tuple[str, str]]:
        """(stage, status), in order."""
        return [(fields["stage"], fields["status"]) for event, fields in self.events if event == "stage"]


KEPT = [(name, "kept") for name in STAGE_NAMES]


def turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def own_config(folder: Path, make: Callable[..., Path], *assignments: str) -> RunConfig:
    """Two models and their data, made in `folder`: rows are text and messages by turns, as TRL takes both."""
    policy, reference = make(folder / "policy", seed=1), make(folder / "reference", seed=2)
    prompts = [f"question number {n}" for n in range(PROMPTS)]
    asked: list[dict[str, Any]] = [{"prompt": text if n % 2 else turn("user", text)} for n, text in enumerate(prompts)]
    pairs: list[dict[str, Any]] = []
    for n in range(PAIRS):
        prompt, chosen, rejected = f"offline question {n}", f"good {n}", f"a bad answer {n}"
        pairs.append(
            {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            if n % 2
            else {
                "prompt": turn("user", prompt),
                "chosen": turn("assistant", chosen),
                "rejected": turn("assistant", rejected),
            }
        )
    for name, rows in (("prompts", asked), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    named = [
        f"model.policy={policy}",
        f"model.reference={reference}",
        f"data.prompts={folder / 'prompts.jsonl'}",
        f"data.replay={folder / 'pairs.jsonl'}",
    ]
    return resolve([], [*named, *assignments], SMALL)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in one order, in this process's workers as in any other's; and no network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return own_config(tmp_path_factory.mktemp("own"), make_mistral)


@pytest.fixture(scope="module")
def whole(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    told = Told()
    metrics = rounds.run(config, folder, told, after_round=write_report)
    assert list(metrics) == ["round-01"]
    assert told.stages() == [(name, status) for name in STAGE_NAMES for status in ("running", "done")]
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "copy")


def frames(folder: Path, pattern: str) -> pl.DataFrame:
    files = sorted((folder / "round-01").glob(pattern))
    assert files
    return pl.concat([pl.read_parquet(file) for file in files])


# Which models a round has


def faked_stages(monkeypatch: pytest.MonkeyPatch, config: RunConfig, folder: Path) -> list[tuple[Any, ...]]:
    """Runs the loop with stages that run no model; returns (stage, models that it was given)."""
    given: list[tuple[Any, ...]] = []

    def spawn(self: Run, job: Job, folder: Path, **_: Any) -> StageResult:
        if isinstance(job, GenerateJob):
            given.append(("generate", job.policy))
            file = job.out / "generations-00000.parquet"
            key = f"round {job.round_number}"
            rows = [(p, s, [1], [1], "x", 1 + s, 1 + s, "stop", 0.0) for p in range(3) for s in range(SAMPLES)]
            write_parquet(file, pl.DataFrame(rows, schema=GENERATIONS, orient="row"), key=key)
            return StageResult([(file, key)], {"responses": len(rows), "prompts": 3})
        if isinstance(job, ScoreJob):
            given.append(("score", job.policy, job.reference))
            file = job.out / "scores-00000.parquet"
            rows = [(0.0, 0.0, 0.1 * (n % 5)) for n in range(3 * SAMPLES)]
            write_parquet(file, pl.DataFrame(rows, schema=SCORES, orient="row"), key=job.shard_keys()[0])
            return StageResult([(file, job.shard_keys()[0])], {})
        if isinstance(job, ReplayJob):
            file = job.out / "training_set.parquet"
            write_parquet(file, pl.DataFrame({"none": [0]}), key=job.key())
            return StageResult([(file, job.key())], {})
        if isinstance(job, TrainJob):
            given.append(("train", job.policy))
            write_json(job.target / "dice.json", {"key": job.key()})
            return StageResult([(job.target, job.key())], {})
        if isinstance(job, EvaluateJob):
            given.append(("evaluate", job.policy, job.reference, job.start, job.initial_reference))
            write_json(job.out / "metrics.json", {})
            return StageResult([(job.out / "metrics.json", "metrics")], {})
        assert isinstance(job, PreflightJob)
        return StageResult([], {})

    monkeypatch.setattr(Run, "spawn", spawn)
    rounds.run(config, folder)
    return given


@pytest.mark.parametrize("reward_reference", ["previous", "initial"])
def test_the_reference_moves_or_stays(
    config: RunConfig, reward_reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config.model_copy(update={"rounds": 3, "reward_reference": reward_reference})
    folder = tmp_path / "run"
    given = faked_stages(monkeypatch, config, folder)
    first, initial = Path(str(config.model.policy)), Path(str(config.model.reference))
    policies = [first, *(folder / f"round-{number:02d}" / "train" / "model" for number in (1, 2, 3))]
    # Round t's rewards are log π_t − log π_ref; after it, the next round's are what is measured.
    references = [initial, *policies[:3]] if reward_reference == "previous" else [initial] * 4
    expected: list[tuple[Any, ...]] = []
    for t in range(3):
        expected += [
            ("generate", policies[t]),
            ("score", policies[t], references[t]),
            ("train", policies[t]),
            ("evaluate", policies[t + 1], references[t + 1], first, initial),
        ]
    assert given == expected
    # The order of the work says nothing of what a resume takes for granted; the keys do.
    stages = read_json(folder / "manifest.json")["stages"]
    assert len({stages[f"round-{number:02d}/score"]["key"] for number in (1, 2, 3)}) == 3


def test_another_reference_is_another_key(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {}
    for name in ("previous", "initial"):
        changed = config.model_copy(update={"rounds": 2, "reward_reference": name})
        faked_stages(monkeypatch, changed, tmp_path / name)
        keys[name] = {
            stage: entry["key"] for stage, entry in read_json(tmp_path / name / "manifest.json")["stages"].items()
        }
    same = {stage for stage, key in keys["previous"].items() if keys["initial"][stage] == key}
    first = [f"round-01/{stage}" for stage in ROUND_STAGES if stage != "evaluate"]
    assert same == {*first, "round-02/generate"}


# What a run leaves


def test_the_folder_of_a_run(config: RunConfig, whole: Path) -> None:
    assert load_resolved(whole / "config.yaml") == config
    for name in ("manifest.json", "events.jsonl", "report.html", "inputs/prompts.parquet", "inputs/offline.parquet"):
        assert (whole / name).stat().st_size > 0
    assert sorted(path.name for path in (whole / "round-01").iterdir()) == sorted(ROUND_STAGES)
    assert not list(whole.rglob("*.tmp"))
    events = [json.loads(line) for line in (whole / "events.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "finished"
    assert all(event["event"] != "progress" for event in events)
    (profiled,) = read_json(whole / "profile.json")["rounds"]
    assert [stage["stage"] for stage in profiled["stages"]] == STAGE_NAMES


def test_the_manifest_names_whole_files_with_their_keys(whole: Path) -> None:
    stages = read_json(whole / "manifest.json")["stages"]
    assert list(stages) == STAGE_NAMES
    for name, entry in stages.items():
        assert entry["status"] == "done"
        assert entry["seconds"] >= 0
        assert entry["files"]
        for made in entry["files"]:
            path = whole / made["file"]
            if path.suffix == ".parquet":
                assert parquet_key(path) == made["key"], name
            elif path.is_dir():
                assert read_json(path / "dice.json")["key"] == made["key"]
            else:
                assert path.is_file()
    assert [len(stages[f"round-01/{name}"]["files"]) for name in ("generate", "score")] == [3, 3]


def test_what_the_stages_made_fits_together(whole: Path) -> None:
    generations, scores = frames(whole, "generate/generations-*.parquet"), frames(whole, "score/*.parquet")
    prompts = pl.read_parquet(whole / "inputs/prompts.parquet")
    assert generations.height == scores.height == prompts.height * SAMPLES == (PROMPTS - 2) * SAMPLES
    difference = (scores["logp"] - scores["ref_logp"]) * 0.1
    assert (difference - scores["reward"]).abs().max() < 1e-4
    mined, training = frames(whole, "mine/*.parquet"), frames(whole, "replay/training_set.parquet")
    sources = dict(training["source"].value_counts().iter_rows())
    assert sources == {"mined": mined.height, "replay": mined.height}  # γ is one half
    from_mined = training.filter(pl.col("source") == "mined")
    assert sorted(from_mined["ref_chosen_logps"]) == sorted(scores["logp"].gather(mined["chosen_row"]))
    counts = read_json(whole / "manifest.json")["stages"]["round-01/train"]["counts"]
    assert counts["steps"] == STEPS
    assert abs(counts["step0_loss"] - math.log(2)) < 1e-3


def test_the_metrics_of_a_round(whole: Path) -> None:
    metrics = read_json(whole / "round-01/evaluate/metrics.json")
    assert {
        "mean_response_tokens",
        "start_mean_response_tokens",
        "implicit_reward_accuracy",
        "length_only_accuracy",
    } <= set(metrics)
    assert "oracle_win_rate" not in metrics  # only the world has an oracle
    assert (metrics["eval_prompts"], metrics["eval_samples"]) == (2, 1)
    assert 0.0 <= metrics["implicit_reward_accuracy"] <= 1.0


def test_held_out_rows_are_not_trained_on(whole: Path) -> None:
    def said(name: str, column: str) -> set[str]:
        frame = pl.read_parquet(whole / "inputs" / f"{name}.parquet")
        return {messages[-1]["content"] for messages in frame[column].to_list()}

    assert not said("prompts", "messages") & said("eval_prompts", "messages")
    assert len(said("eval_prompts", "messages")) == 2
    assert not said("offline", "prompt") & said("eval_pairs", "prompt")
    assert len(said("eval_pairs", "prompt")) == 3


def test_status_of_a_finished_run(whole: Path) -> None:
    found = run_status(whole)
    assert (found["state"], found["done"], found["stages"]) == ("finished", 6, 6)
    assert [(entry["stage"], entry["status"]) for entry in found["entries"]] == [(n, "done") for n in STAGE_NAMES]
    assert found["entries"][0]["counts"]["responses"] == (PROMPTS - 2) * SAMPLES


# What is made again


def no_worker(work: Any, **_: Any) -> Any:
    raise AssertionError(f"a worker was started: {work_name(work)}")


def test_a_second_run_keeps_everything(
    config: RunConfig, copy: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "run_in_subprocess", no_worker)
    told = Told()
    metrics = rounds.run(config, copy, told)
    assert metrics == {"round-01": read_json(whole / "round-01/evaluate/metrics.json")}
    assert told.stages() == KEPT


def test_a_run_of_another_config_is_refused(config: RunConfig, copy: Path) -> None:
    with pytest.raises(UsageError, match="holds a run of another config"):
        rounds.run(config.model_copy(update={"seed": 1}), copy)


def test_a_lost_shard_is_made_again_alone(copy: Path, whole: Path) -> None:
    lost, kept = (copy / f"round-01/score/scores-{number:05d}.parquet" for number in (1, 2))
    lost.unlink()
    before = kept.stat().st_mtime_ns
    told = Told()
    rounds.resume(copy, told)
    # The same shard comes back under the same key: what was made from it still holds.
    redone = [("round-01/score", "running"), ("round-01/score", "done")]
    assert told.stages() == [KEPT[0], *redone, *KEPT[2:]]
    assert [fields["file"] for event, fields in told.events if event == "shard"] == [lost.name]
    assert kept.stat().st_mtime_ns == before
    assert_frame_equal(frames(copy, "score/*.parquet"), frames(whole, "score/*.parquet"), check_exact=True)


def test_what_depends_on_a_changed_key_is_made_again(
    config: RunConfig, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = config.model_copy(update={"mine": config.mine.model_copy(update={"debias": "none"})})
    (copy / "config.yaml").write_text(dump(changed))

    def only_preflight(work: Any, **_: Any) -> Any:
        return StageResult([], {}) if "preflight" in work_name(work) else no_worker(work)

    monkeypatch.setattr(run_folder, "run_in_subprocess", only_preflight)
    told = Told()
    with pytest.raises(AssertionError, match="replay:ReplayJob"):
        rounds.resume(copy, told)
    redone = [("round-01/mine", "running"), ("round-01/mine", "done"), ("round-01/replay", "running")]
    assert told.stages() == [*KEPT[:2], *redone]


# What earlier rounds mined


@pytest.mark.slow
def test_a_second_round_replays_what_the_first_mined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = tmp_path / "second.jsonl"
    rows = [{"prompt": f"another question {n}", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(20)]
    second.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = own_config(
        tmp_path, make_mistral, "rounds=2", "data.prompts_per_round=10", "evaluate.prompts=2", "train.max_steps=2",
        "replay.buffer.capacity=8", "replay.buffer.half_life=1", "replay.buffer.share=2",
        f"replay.buffers.second.path={second}",
    )  # fmt: skip
    folder = tmp_path / "run"
    rounds.run(config, folder)
    assert pl.read_parquet(folder / "inputs/buffer-second.parquet").height == 20

    mined = [pl.read_parquet(folder / f"round-{n:02d}/mine/mined.parquet") for n in (1, 2)]
    kept = [pl.read_parquet(folder / f"buffer/round-{n:02d}.parquet") for n in (1, 2)]
    assert kept[0].height == min(8, mined[0].height)
    assert mined[1].height > 0
    generations = pl.concat(pl.read_parquet(f) for f in sorted((folder / "round-01/generate").glob("gen*.parquet")))
    first = kept[0]
    for side in ("chosen", "rejected"):
        tokens = generations["token_ids"].gather(mined[0][f"{side}_row"].gather(first["index"]))
        assert first[f"{side}_ids"].to_list() == tokens.to_list()
    assert first["margin"].to_list() == mined[0]["margin"].gather(first["index"]).to_list()

    # A share of ½ is as many as were mined. Round 1 has two buffers; round 2 its own past as well, at half of it.
    sets = [pl.read_parquet(folder / f"round-{n:02d}/replay/training_set.parquet") for n in (1, 2)]
    sources = [dict(frame["source"].value_counts().iter_rows()) for frame in sets]
    assert set(sources[0]) == {"mined", "replay", "replay:second"}
    stages = read_json(folder / "manifest.json")["stages"]
    asked = stages["round-02/replay"]["counts"]["buffers"]
    assert list(asked) == ["replay", "second", "rounds"]
    assert sum(found["requested"] for found in asked.values()) == mined[1].height
    assert abs(asked["rounds"]["requested"] - mined[1].height / 2) < 1
    drawn = sets[1].filter(pl.col("source") == "replay:rounds")
    assert drawn.height == min(asked["rounds"]["requested"], first.height) > 0
    stored = {(tuple(p), tuple(c)) for p, c in first.select("prompt_ids", "chosen_ids").iter_rows()}
    assert {(tuple(p), tuple(c)) for p, c in drawn.select("prompt_ids", "chosen_ids").iter_rows()} <= stored
    # Scored again, by the policy that round 2 starts from; it is not the one that sampled them.
    policies = [Path(str(config.model.policy)), folder / "round-01/train/model"]
    for policy, near in zip(policies, (False, True), strict=True):
        logps = score_pairs(config.score, config.model, policy=policy, pairs=drawn)
        assert ((logps["chosen_logp"] - drawn["ref_chosen_logps"]).abs().max() < 1e-3) is near

    # A resume makes the lost set again, from the same buffer, and appends nothing.
    lost = folder / "round-02/replay/training_set.parquet"
    lost.unlink()
    before = {path: path.stat().st_mtime_ns for path in (folder / "buffer").iterdir()}
    told = Told()
    rounds.resume(folder, told)
    assert [stage for stage, status in told.stages() if status == "done"] == ["round-02/replay"]
    assert_frame_equal(pl.read_parquet(lost), sets[1], check_exact=True)
    assert {path: path.stat().st_mtime_ns for path in (folder / "buffer").iterdir()} == before

    # What a round draws from is part of its key: with another past, its set is made again.
    monkeypatch.setattr(run_folder, "run_in_subprocess", no_worker)
    entry = ReplayBuffer(folder / "buffer", 8, seed_for(config.seed, "buffer"))
    entry.append(1, kept[0].drop("round", "index", "priority")[:3], "another past")
    monkeypatch.setattr(rounds, "append_mined", lambda *_, **__: None)
    told = Told()
    with pytest.raises(AssertionError, match="replay:ReplayJob"):
        rounds.resume(folder, told)
    assert told.stages()[-1] == ("round-02/replay", "running")
    assert ("round-01/replay", "kept") in told.stages()


# Candidates of several rounds


@pytest.mark.slow
def test_a_second_round_mines_the_candidates_of_both(tmp_path: Path) -> None:
    # Of 22 prompts each round takes 14, so that some are asked in both.
    config = own_config(
        tmp_path, make_mistral, "rounds=2", "data.prompts_per_round=14", "evaluate.prompts=2", "train.max_steps=2",
        "mine.pool_rounds=2", "mine.chosen_from=newest", "mine.rejected_from=oldest", "replay.buffer.capacity=50",
    )  # fmt: skip
    folder = tmp_path / "run"
    rounds.run(config, folder)

    stages = read_json(folder / "manifest.json")["stages"]
    sampled = [[folder / f["file"] for f in stages[f"round-{n:02d}/generate"]["files"]] for n in (1, 2)]
    files = [[folder / f["file"] for f in stages[f"round-{n:02d}/score"]["files"]] for n in (1, 2)]
    assert [len(found) for found in files] == [2, 4]
    generations = pl.concat(pl.read_parquet(file) for found in sampled for file in found)
    first, second = (pl.concat(map(pl.read_parquet, found)) for found in files)
    old, new = second[: first.height], second[first.height :]
    assert second.height == generations.height == 2 * first.height == 2 * new.height
    # Round 2's reference is what round 1 started from; its policy is another model.
    assert (old["ref_logp"] - first["logp"]).abs().max() < 1e-3
    assert (old["logp"] - first["logp"]).abs().max() > 1e-2
    assert ((second["logp"] - second["ref_logp"]) * 0.1 - second["reward"]).abs().max() < 1e-4

    mined = pl.read_parquet(folder / "round-02/mine/mined.parquet")
    sampled_in = pl.Series([1 + (row >= first.height) for row in range(second.height)])
    for side in ("chosen", "rejected"):
        rows = mined[f"{side}_row"]
        assert generations["prompt_id"].gather(rows).to_list() == mined["prompt_id"].to_list()
        assert second["reward"].gather(rows).to_list() == mined[f"{side}_reward"].to_list()
        assert sampled_in.gather(rows).to_list() == mined[f"{side}_policy"].to_list()
    asked = [set(pl.read_parquet(folder / f"round-{n:02d}/generate/prompts.parquet")["prompt_id"]) for n in (1, 2)]
    assert len(asked[0] & asked[1]) == 6
    # The newest and the oldest round that left the prompt something to use.
    usable = generations.with_columns(round=sampled_in).filter(pl.col("finish_reason") != "length")
    known = usable.group_by("prompt_id").agg(newest=pl.col("round").max(), oldest=pl.col("round").min())
    expected = mined.select("prompt_id").join(known, on="prompt_id", how="left", maintain_order="left")
    assert mined["chosen_policy"].to_list() == expected["newest"].to_list()
    assert mined["rejected_policy"].to_list() == expected["oldest"].to_list()
    assert mined.filter(chosen_policy=2, rejected_policy=1).height > 0
    assert read_json(folder / "round-02/mine/mining.json")["pooled_rounds"] == [1, 2]

    # What is trained on is of the right prompts, and has the log-probabilities of round 2's policy.
    training = pl.read_parquet(folder / "round-02/replay/training_set.parquet").filter(pl.col("source") == "mined")
    prompts = pl.read_parquet(folder / "inputs/prompts.parquet")
    texts = dict(zip(prompts["prompt_id"], prompts["messages"].to_list(), strict=True))
    assert training["prompt"].to_list() == [texts[prompt] for prompt in mined["prompt_id"]]
    assert training["chosen_ids"].to_list() == generations["token_ids"].gather(mined["chosen_row"]).to_list()
    logps = score_pairs(config.score, config.model, policy=folder / "round-01/train/model", pairs=training)
    for side in ("chosen", "rejected"):
        assert (logps[f"{side}_logp"] - training[f"ref_{side}_logps"]).abs().max() < 1e-3
    assert abs(stages["round-02/train"]["counts"]["step0_loss"] - math.log(2)) < 1e-3
    buffer = pl.read_parquet(folder / "buffer/round-02.parquet")
    assert set(map(tuple, buffer["chosen_ids"])) <= set(map(tuple, training["chosen_ids"]))

    # A resume scores the lost shard of the first round again, and nothing else.
    lost = files[1][0]
    lost.unlink()
    told = Told()
    rounds.resume(folder, told)
    assert [stage for stage, status in told.stages() if status == "done"] == ["round-02/score"]
    assert [fields["file"] for event, fields in told.events if event == "shard"] == [lost.name]
    assert_frame_equal(pl.concat(map(pl.read_parquet, files[1])), second, check_exact=True)


# What a kill costs

_KILLED = """
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


def gone(session: int, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while left_in_session(session):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


KILLS = [
    ("generate", "shard", 1, "generate/generations-*.parquet"),
    ("score", "shard", 1, "score/scores-*.parquet"),
    ("mine", "-", 1, "mine/mined.parquet"),
    ("train", "progress", 3, "train/checkpoints/checkpoint-2/dice.json"),
]
"""Stage, event, at which of these events of the stage, and what must then be there."""


@pytest.mark.slow
def test_a_run_that_was_killed_in_every_stage_ends_as_an_unkilled_one(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    asked = ["run", "-c", str(whole / "config.yaml"), "--run-dir", str(folder)]
    written: dict[Path, int] = {}
    for stage, event, number, name in KILLS:
        command = [sys.executable, "-c", _KILLED, f"round-01/{stage}", event, str(number), *asked]
        with (tmp_path / "output").open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
            assert process.wait(300) == -signal.SIGKILL, (tmp_path / "output").read_text()
        assert gone(process.pid)
        at = ROUND_STAGES.index(stage)
        statuses = [entry["status"] for entry in run_status(folder)["entries"]]
        assert statuses == ["done"] * at + ["stopped"] + ["to do"] * (5 - at)
        left = sorted((folder / "round-01").glob(name))
        assert left
        if event == "shard":
            assert len(left) < 3
            written |= {file: file.stat().st_mtime_ns for file in left}
        asked = ["resume", str(folder)]

    told = Told()
    rounds.resume(folder, told)
    redone = [(name, status) for name in STAGE_NAMES[4:] for status in ("running", "done")]
    assert told.stages() == [*KEPT[:4], *redone]
    notes = [fields["text"] for event, fields in told.events if event == "note"]
    assert any(note.startswith("training resumes from checkpoint-") for note in notes)
    # A shard that was whole when the kill came is never written again.
    assert {file: file.stat().st_mtime_ns for file in written} == written

    for pattern in ("generate/generations-*", "score/*", "mine/*", "replay/training_set*"):
        ours, theirs = (frames(run, f"{pattern}.parquet").drop("sampled_logp", strict=False) for run in (folder, whole))
        assert_frame_equal(ours, theirs, check_exact=True)
    model = "round-01/train/model/model.safetensors"
    weights, unkilled = load_file(folder / model), load_file(whole / model)
    assert weights.keys() == unkilled.keys()
    assert all(torch.equal(weights[name], unkilled[name]) for name in weights)
    metrics = "round-01/evaluate/metrics.json"
    assert read_json(folder / metrics) == read_json(whole / metrics)
    assert not list(folder.rglob(".*.tmp"))
    assert run_status(folder)["state"] == "finished"


@pytest.mark.slow
def test_sigterm_ends_a_run_that_can_go_on(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump(config))
    folder = tmp_path / "stopped"
    asked = ["run", "-c", str(tmp_path / "config.yaml"), "--run-dir", str(folder)]
    command = [sys.executable, "-c", "from cli.main import main; main()", *asked]
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, start_new_session=True)
    try:
        end = time.monotonic() + 120
        while not list(folder.glob("round-01/generate/worker.log")):
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.01)
        assert len(left_in_session(process.pid)) > 1
        os.kill(process.pid, signal.SIGTERM)
        said = (process.wait(60), (tmp_path / "out").read_text())
    finally:
        process.kill()
    told = (tmp_path / "err").read_text()
    assert said == (5, ""), told
    assert told.strip().splitlines()[-1].endswith(f"Continue with: dice resume {folder}")
    assert "Traceback" not in told
    assert gone(process.pid)
    assert run_status(folder)["state"] == "stopped"
    assert json.loads((folder / "events.jsonl").read_text().splitlines()[-1])["event"] == "interrupted"


# Through vLLM


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="measured with vLLM's CPU build, and a GPU is here")
def test_a_round_through_vllm(tmp_path: Path) -> None:
    settings = ("generate.engine=vllm", "generate.vllm.kv_cache_gib=0.25", "evaluate.prompts=0")
    folder = tmp_path / "run"
    rounds.run(own_config(tmp_path, make_llama, *settings), folder)
    assert run_status(folder)["state"] == "finished"
    counts = {name: entry["counts"] for name, entry in read_json(folder / "manifest.json")["stages"].items()}
    assert counts["round-01/generate"]["engine"] == "vllm"
    generations = frames(folder, "generate/generations-*.parquet")
    assert generations.height == PROMPTS * SAMPLES
    cut = generations.filter(pl.col("finish_reason") == "length")
    assert set(generations["finish_reason"]) == {"stop", "length"}
    assert set(cut["response_tokens"]) == {MAX_NEW}
    dropped = counts["round-01/mine"]["dropped"]
    assert dropped["truncated"] == cut.height == counts["round-01/generate"]["cut_off"]
    mined = frames(folder, "mine/*.parquet")
    for side in ("chosen_row", "rejected_row"):
        assert set(generations["finish_reason"].gather(mined[side])) == {"stop"}
    scores = frames(folder, "score/*.parquet")
    assert (scores["logp"] - generations["sampled_logp"]).abs().max() < 1e-3
    assert abs(counts["round-01/train"]["step0_loss"] - math.log(2)) < 1e-3
