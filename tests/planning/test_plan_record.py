"""Which costs are kept: those of a calibration, and those that a run leaves."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
from plan_data import COSTS, changed, own, write_weights

from dice_py.config.loading import dump
from dice_py.data import Message, Pair, pairs_frame, prompts_frame
from dice_py.planning import calibration
from dice_py.planning import plan as plan_module
from dice_py.planning.calibrate_generation import Probe
from dice_py.planning.plan import plan
from dice_py.runs.inputs import Inputs
from dice_py.runs.measured_costs import COSTS as COSTS_KIND
from dice_py.runs.measured_costs import EvaluateCosts, recall_costs, remember_costs
from dice_py.runs.measured_lengths import lengths_key
from dice_py.runs.throughput import costs_key, remember_run
from dice_py.storage.cache import remember
from dice_py.storage.files import Manifest, read_json, write_json, write_sealed
from dice_py.storage.parquet import write_parquet
from dice_py.storage.schemas import GENERATIONS, PROMPTS
from dice_py.training.parallelism import ProcessLayout


@pytest.fixture
def remembering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A plan of a hand-made model and data, whose processes are replaced: `calls` are their functions."""
    monkeypatch.setenv("DICE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "p"
    folder.mkdir()
    shape = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
    (folder / "config.json").write_text(json.dumps(shape))
    write_weights(folder / "model.safetensors", {"w": {"dtype": "F32", "shape": [1000]}})
    prompts = [[{"role": "user", "content": f"question {n}"}] for n in range(4)]
    frame = prompts_frame(prompts)
    offline = pairs_frame([Pair(prompt=p, chosen=[ANSWER], rejected=[ANSWER]) for p in (*prompts[:1], *OTHERS)])
    inputs = Inputs(
        policy=folder,
        reference=folder,
        prompts=write_parquet(tmp_path / "prompts.parquet", frame, key="prompts", schema=PROMPTS),
        offline=write_parquet(tmp_path / "offline.parquet", offline, key="offline"),
        eval_prompts=None,
        eval_pairs=None,
    )
    config = own("rounds=1", "generate.samples=2", "train.batch_size=4", "model.device=cpu")
    state: dict[str, Any] = {"calls": [], "config": config, "inputs": inputs, "host": 10**12}

    def run(self: calibration.SubprocessRunner, stage: str, work: partial[Any]) -> Any:
        given = work.keywords
        state["calls"].append((work.func.__name__, given.get("measure")))
        self.startup[stage] = 3.0
        if stage == "train":
            return COSTS.score, COSTS.train
        if given["measure"] != "nothing":
            sampled = pl.DataFrame(
                {"prompt_id": [0, 0, 1, 1], "response_tokens": [5] * 4, "finish_reason": ["stop"] * 4}
            )
            write_parquet(given["out"] / "generations-00000.parquet", sampled, key="k")
        return Probe(
            engine="transformers", dtype="float32", device="a CPU", cuda=False, groups=1, gpus=0, gpu_names=(),
            threads=1, layout=ProcessLayout(), host_free_bytes=state["host"], gpu_free_bytes=None, gpu_bytes=None,
            base_memory_bytes=1000, prompt_tokens=dict.fromkeys(range(4), 10), eval_prompt_tokens=[],
            tokenizer_seconds=0.2, encode_seconds=0.01,
            generate=COSTS.generate if given["measure"] == "costs" else None,
        )  # fmt: skip

    monkeypatch.setattr(calibration.SubprocessRunner, "run", run)
    monkeypatch.setattr(plan_module, "prepare", lambda run: inputs)
    return state


ANSWER: Message = {"role": "assistant", "content": "yes"}
OTHERS: list[list[Message]] = [[{"role": "user", "content": f"other {n}"}] for n in range(2)]
EVERYTHING = [("probe", "costs"), ("measure_score_and_train", None)]


def test_costs_come_back_as_they_were_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DICE_CACHE", str(tmp_path))
    pair_tokens = changed(COSTS, "score", pair_tokens=(1.0, 2.5, 3.0))
    kept = pair_tokens.model_copy(update={"evaluate": EvaluateCosts(workload=(7, 1, 3), work=[4.0], load=[1.0])})
    remember_costs("key", kept)
    assert recall_costs("key") == kept
    assert recall_costs("another key") is None


def test_costs_of_another_version_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DICE_CACHE", str(tmp_path))
    stored = COSTS.model_dump(mode="json")
    remember("throughput", "key", stored)
    assert recall_costs("key") is None
    step = {
        "load": 1.0,
        "fixed": 2.0,
        "per_step": 0.5,
        "step_tokens": 120.0,
        "save": 0.25,
        "checkpoint_bytes": 700,
        "peak_bytes": 0,
    }  # of version 0.9
    for changes in ({"starts": 1.0}, {"train": {"load": 1.0}}, {"train": step}):
        remember(COSTS_KIND, "key", stored | changes)
        assert recall_costs("key") is None
    remember(COSTS_KIND, "key", stored)
    assert recall_costs("key") == COSTS


def test_costs_are_measured_once(remembering: dict[str, Any], tmp_path: Path) -> None:
    def planned(**options: Any) -> list[Any]:
        remembering["calls"].clear()
        found = plan(remembering["config"], tmp_path / "run", **options)
        json.dumps(found, allow_nan=False)
        return [found["calibration"]["source"], found["stages"]["round-01/replay"]["replayed"], *remembering["calls"]]

    # Of three offline pairs one is on a prompt of the round.
    assert planned() == ["measured", 2, *EVERYTHING]
    assert planned() == ["stored", 2, ("probe", "nothing")]
    assert planned(fresh=True) == ["measured", 2, *EVERYTHING]
    # Other prompts may be answered at another length, at the same speed.
    key = lengths_key(remembering["config"], remembering["inputs"].policy, remembering["inputs"].prompts)
    remembered = tmp_path / "cache" / "remembered.json"
    stored = read_json(remembered)
    del stored["response lengths"][key]
    write_sealed(remembered, stored, "remembered")
    assert planned() == ["stored", 2, ("probe", "lengths")]


def test_a_full_disk_and_a_small_memory(
    remembering: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = remembering["config"]
    assert plan(config, tmp_path / "run")["fits"] is True
    remembering["host"] = 2000
    found = plan(config, tmp_path / "run")
    assert (found["fits"], found["first_failure"]["what"], found["free_memory_bytes"]) == (False, "memory", 2000)
    remembering["host"] = 10**12
    places: list[Path] = []

    def disk_usage(place: Path) -> Any:
        places.append(place)
        return SimpleNamespace(free=5)

    monkeypatch.setattr(plan_module.shutil, "disk_usage", disk_usage)
    found = plan(config, tmp_path / "not" / "there" / "yet")
    assert (found["first_failure"]["what"], found["first_failure"]["available"]) == ("disk", 5)
    assert places == [tmp_path]


def test_the_key_of_costs(remembering: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config, policy = remembering["config"], remembering["inputs"].policy
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    key = costs_key(config, policy, "transformers")

    def other(*assignments: str) -> str:
        config = own("generate.samples=2", "train.batch_size=4", "model.device=cpu", *assignments)
        return costs_key(config, policy, "transformers")

    # Settings that only change counts are not part of it.
    assert other("rounds=7", "data.prompts_per_round=3", "train.max_steps=9", "generate.temperature=0.5") == key
    changed = ["train.batch_size=8", "model.dtype=bfloat16", "train.lora.r=2", "generate.token_budget=77"]
    keys = {key, *map(other, changed)}
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert len(keys | {costs_key(config, policy, "transformers")}) == 6


TOOK = {"generate": 4.0, "score": 3.0, "mine": 0.5, "replay": 2.0, "inspect": 2.0, "train": 6.0, "evaluate": 5.0}
PARTS = {
    # spawn, import, load, work
    "generate": (0.0, 2.0, 0.5, 1.5),
    "score": (1.0, 0.0, 1.0, 1.0),
    "replay": (0.5, 0.0, 0.5, 1.0),
    "inspect": (0.0, 0.0, 1.0, 1.0),
    "train": (2.0, 0.0, 0.5, 3.5),
    "evaluate": (0.0, 0.0, 1.0, 4.0),
}
"""Replay's process is started with score, and training's with inspect, which does not wait for its own."""


def made_run(folder: Path, remembering: dict[str, Any], **changes: Any) -> Path:
    """One round of 150 prompts of 10 tokens, 2 responses of 5."""
    inputs, config = remembering["inputs"], remembering["config"]
    base = folder / "round-01"
    count = changes.get("prompts", 150)
    manifest = Manifest(folder / "manifest.json")
    folder.mkdir()
    manifest.data["policy"] = {"folder": str(inputs.policy), "identity": "i"}
    (folder / "config.yaml").write_text(dump(config))
    (folder / "inputs").mkdir()
    shutil.copy(inputs.prompts, folder / "inputs" / "prompts.parquet")
    rows = [(p, s, [1] * 10, [2] * 5, "x", 5, 1, "stop", 0.0) for p in range(count) for s in range(2)]
    generations = pl.DataFrame(rows, schema=GENERATIONS, orient="row")
    write_parquet(base / "generate" / "generations-00000.parquet", generations, key="g")
    write_parquet(base / "score" / "scores-00000.parquet", pl.DataFrame({"reward": [0.0] * 2 * count}), key="s")
    write_parquet(base / "mine" / "mined.parquet", pl.DataFrame({"margin": [0.0] * count}), key="m")
    sides = {"prompt_ids": [[1] * 10] * 4, "chosen_ids": [[2] * 5] * 4, "rejected_ids": [[2] * 5] * 4}
    training = pl.DataFrame({**sides, "source": ["mined", "mined", "replay", "replay"]})
    write_parquet(base / "replay" / "training_set.parquet", training, key="t")
    (base / "train" / "model").mkdir(parents=True)
    write_json(base / "train" / "model" / "train_log.json", [{"loss": 0.5}, {"train_runtime": 3.0}])
    gate = {"responses": 256, "passed": True}
    counts: dict[str, Any] = {
        "generate": {"prompts": count, "responses": 2 * count, "engine": "transformers"},
        "score": {"policy_logps_gate": gate},
        "train": {"steps": 6},
        "evaluate": {"eval_prompts": 7, "eval_samples": 1, "eval_pairs": 3},
    }
    now, events = 100.0, [{"time": 100.0, "event": "started"}]
    files = {"generate": "generations-00000.parquet", "score": "scores-00000.parquet", "mine": "mined.parquet",
             "replay": "training_set.parquet", "inspect": "distributions.json", "train": "model",
             "evaluate": "metrics.json"}  # fmt: skip
    for stage, seconds in TOOK.items():
        name = f"round-01/{stage}"
        file = [{"file": f"round-01/{stage}/{files[stage]}", "key": "k"}]
        manifest.record(name, status="done", seconds=seconds, counts=counts.get(stage, {}), files=file)
        events.append({"time": now, "event": "stage", "stage": name, "status": "running"})
        if stage == "generate":
            shard = {"file": "f", "sequences": 2 * count, "tokens": 10 * count, "seconds": 1.2}
            events.append({"time": now, "event": "throughput", "stage": stage, **shard})
        if stage == "score":
            shard = {"file": "f", "sequences": 2 * count, "tokens": 20 * count, "seconds": 0.3}
            events.append({"time": now, "event": "throughput", "stage": stage, **shard})
        if stage in PARTS and stage not in changes.get("inline", ()):
            parts = dict(zip(("spawn", "import", "load", "work"), PARTS[stage], strict=True))
            work = f"dice_py.{stage}:{stage}"
            events.append({"time": now + seconds, "event": "process", "work": work, "seconds": parts})
        now += seconds
        events.append({"time": now, "event": "stage", "stage": name, "status": "done", "seconds": seconds})
    events += changes.get("more", [])
    (folder / "events.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    return folder


def test_a_run_leaves_its_costs(remembering: dict[str, Any], tmp_path: Path) -> None:
    config, policy = remembering["config"], remembering["inputs"].policy
    folder = made_run(tmp_path / "run", remembering)
    assert remember_run(folder) is True
    costs = recall_costs(costs_key(config, policy, "transformers"))
    assert costs is not None
    assert costs.source == "run"
    # Score's process was ready 5 s after generate began, replay's 4 s after score, training's 4 s after inspect.
    # Generate's own had 2 s of import; evaluation did not wait: no more than training took, and than the others do.
    start = {"generate": 2.0, "score": 4.0 + 1.0, "replay": 3.0 + 0.5 + 0.5, "train": 2.0 + 2.0}
    assert {name: costs.startup[name] for name in start} == pytest.approx(start)
    assert costs.startup["evaluate"] == pytest.approx(sum(costs.startup[name] for name in start) / 4)
    generate, score, train = costs.generate, costs.score, costs.train
    assert generate.per_token == pytest.approx(1.2 / 1500)
    assert generate.per_prompt == pytest.approx((1.5 - 1.2) / 150)
    assert score.per_token == pytest.approx(0.3 / 3000)
    # Each prompt once is 10 tokens for 2 responses of 5.
    assert score.token_ratio == pytest.approx(1.0)
    assert score.fixed == pytest.approx(1.0 - (3000 + 256 * 10) * 1e-4)
    assert score.per_pair == pytest.approx((1.0 - 2 * 30 * 1e-4) / 2)
    assert (train.per_token, train.per_update, train.fixed) == pytest.approx((0.5 / (4 * 30), 0.0, 0.5))
    assert train.check_per_token == 0.0  # part of `fixed`
    assert costs.evaluate == EvaluateCosts(workload=(7, 1, 3), work=[4.0], load=[1.0])
    # The next plan measures nothing.
    planned = plan(config, tmp_path / "next")
    assert [planned["calibration"]["of"], remembering["calls"]] == ["run", [("probe", "nothing")]]


def test_a_stage_without_a_process_is_no_stage_that_one_waits_for(remembering: dict[str, Any], tmp_path: Path) -> None:
    """As the stage inspect is with report.token_credit=false: training's process is started with replay."""
    assert remember_run(made_run(tmp_path / "run", remembering, inline=("inspect",))) is True
    costs = recall_costs(costs_key(remembering["config"], remembering["inputs"].policy, "transformers"))
    assert costs is not None
    assert costs.startup["train"] == pytest.approx(2.0 + 2.0 + 2.0)


def test_a_step_has_no_more_pairs_than_the_training_set(remembering: dict[str, Any], tmp_path: Path) -> None:
    remembering["config"] = own("rounds=1", "generate.samples=2", "train.batch_size=8", "model.device=cpu")
    assert remember_run(made_run(tmp_path / "run", remembering)) is True
    costs = recall_costs(costs_key(remembering["config"], remembering["inputs"].policy, "transformers"))
    assert costs is not None
    assert costs.train.per_token == pytest.approx(0.5 / (4 * 30))  # four pairs


def test_a_run_does_not_replace_a_calibration(remembering: dict[str, Any], tmp_path: Path) -> None:
    plan(remembering["config"], tmp_path / "next")
    assert remember_run(made_run(tmp_path / "run", remembering)) is False
    key = costs_key(remembering["config"], remembering["inputs"].policy, "transformers")
    assert recall_costs(key).source == "calibration"


def test_a_later_run_replaces_the_costs_of_an_earlier_one(remembering: dict[str, Any], tmp_path: Path) -> None:
    key = costs_key(remembering["config"], remembering["inputs"].policy, "transformers")
    assert remember_run(made_run(tmp_path / "first", remembering)) is True
    assert remember_run(made_run(tmp_path / "second", remembering, prompts=300)) is True
    costs = recall_costs(key)
    assert costs is not None
    assert costs.generate.per_token == pytest.approx(1.2 / 3000)


def test_a_busy_machine_is_reported(
    remembering: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def notes(load: float) -> list[str]:
        monkeypatch.setattr(calibration.os, "getloadavg", lambda: (load, 0.0, 0.0))
        texts: list[str] = []
        plan(
            remembering["config"], tmp_path / "run", fresh=True,
            report=lambda event, **fields: texts.append(fields.get("text", "")),
        )  # fmt: skip
        return [text for text in texts if "busy" in text]

    assert len(notes(1000.0)) == 1
    assert notes(0.0) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"prompts": 100},
        {"more": [{"time": 200.0, "event": "started"}]},
        {"more": [{"time": 200.0, "event": "interrupted"}]},
        {"more": [{"time": 200.0, "event": "stage", "stage": "round-01/mine", "status": "kept"}]},
        {"more": [{"time": 200.0, "event": "group", "number": 1, "status": "started"}]},
    ],
    ids=["few responses", "resumed", "interrupted", "kept", "groups"],
)
def test_a_run_that_shows_no_costs_leaves_nothing(
    remembering: dict[str, Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert remember_run(made_run(tmp_path / "run", remembering, **changes)) is False
    assert not (tmp_path / "cache").exists()
