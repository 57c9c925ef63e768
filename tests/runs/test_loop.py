"""The loop on a user's own tiny model: the models of a round, its files, and what a resume makes again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from own_run import KEPT, PROMPTS, SAMPLES, STAGE_NAMES, STEPS, Events, frames, no_worker
from polars.testing import assert_frame_equal

from dice_py.compute.worker import work_name
from dice_py.config.loading import dump, load_resolved
from dice_py.config.run import RunConfig
from dice_py.errors import UsageError
from dice_py.runs import folder as run_folder
from dice_py.runs import loop
from dice_py.runs.folder import Run
from dice_py.runs.status import run_status
from dice_py.stages.evaluate import EvaluateJob
from dice_py.stages.generate import GenerateJob
from dice_py.stages.job import Job, StageResult
from dice_py.stages.preflight import PreflightJob
from dice_py.stages.registry import ROUND_STAGES
from dice_py.stages.replay import ReplayJob
from dice_py.stages.score import ScoreJob
from dice_py.stages.train import TrainJob
from dice_py.storage.files import read_json, write_json
from dice_py.storage.parquet import parquet_key, write_parquet
from dice_py.storage.schemas import GENERATIONS, SCORES


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
    loop.run(config, folder)
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


def test_the_manifest_names_whole_files_with_their_keys(complete_run: Path) -> None:
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
    assert (found["state"], found["done"], found["stages"]) == ("finished", 6, 6)
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


def test_what_depends_on_a_changed_key_is_made_again(
    config: RunConfig, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = config.model_copy(update={"mine": config.mine.model_copy(update={"debias": "none"})})
    (copy / "config.yaml").write_text(dump(changed))

    def only_preflight(work: Any, **_: Any) -> Any:
        return StageResult([], {}) if "preflight" in work_name(work) else no_worker(work)

    monkeypatch.setattr(run_folder, "run_in_subprocess", only_preflight)
    events = Events()
    with pytest.raises(AssertionError, match="replay:ReplayJob"):
        loop.resume(copy, events)
    redone = [("round-01/mine", "running"), ("round-01/mine", "done"), ("round-01/replay", "running")]
    assert events.stages() == [*KEPT[:2], *redone]
