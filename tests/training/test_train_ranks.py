"""Training in two processes: the same model as in one, the same checks, checkpoints, and failures of a rank.

One test uses `accelerate launch`. In the others, the fixture `forked` replaces it, to save the time of the imports.
support/sharded_on_cpu.py shards on the CPU.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import signal
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import sharded_on_cpu
import torch
from places import child_environment
from safetensors.torch import load_file
from tiny_models import make_qwen2
from tiny_sets import scored_pairs, token_pairs
from tiny_training import Stage
from transformers import AutoModelForCausalLM, AutoTokenizer

from dice_py.config.shared import ModelConfig
from dice_py.config.stages import ScoreConfig
from dice_py.config.training import LoraConfig, TrainConfig
from dice_py.errors import DataError, OutOfMemoryError, StoppedTrainingError
from dice_py.scoring.pairs import score_pairs
from dice_py.stages import train as stage
from dice_py.storage.files import read_json
from dice_py.training import launcher, ranks
from dice_py.training.checkpoints import is_trained
from dice_py.training.parallelism import ProcessLayout

pytestmark = pytest.mark.slow

TWO = {"processes": 2}
NEAR = 2e-6
"""Sums in another order, after six steps of AdamW at 1e-3."""


@pytest.fixture
def run(llama: Path, pairs: pl.DataFrame, tmp_path: Path) -> Stage:
    return Stage(llama, pairs, tmp_path)


@pytest.fixture(scope="module")
def alone(llama: Path, pairs: pl.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """A stage that has trained in one process."""
    stage = Stage(llama, pairs, tmp_path_factory.mktemp("alone"))
    stage()
    return stage


def max_abs_diff(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of a weight; the weights must have the same names and dtypes."""
    assert {name: value.dtype for name, value in one.items()} == {name: value.dtype for name, value in other.items()}
    return max((one[name].float() - other[name].float()).abs().max().item() for name in one)


# --- by accelerate launch -------------------------------------------------------------------------------------


def test_two_processes_train_the_same_model(run: Stage, alone: Stage) -> None:
    counts = run(processes=2)
    assert max_abs_diff(run.weights(), alone.weights()) < NEAR
    assert counts["steps"] == 6
    assert counts["step0_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert run.steps() == [1, 2, 3, 4, 5, 6]
    stamp = read_json(run.model / "dice.json")
    assert (stamp["key"], stamp["counts"]) == (run.job(processes=2).key(), counts)
    for file in alone.model.iterdir():
        if file.suffix in (".json", ".jinja") and file.name not in ("train_log.json", "dice.json", "packing.json"):
            assert (run.model / file.name).read_text() == file.read_text()
    assert sorted(file.name for file in run.model.iterdir()) == sorted(file.name for file in alone.model.iterdir())
    losses = [[entry["loss"] for entry in read_json(stage.model / "train_log.json")[:6]] for stage in (run, alone)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert sorted(file.name for file in run.out.iterdir()) == ["accelerate.yaml", "log.jsonl", "model"]
    assert run(processes=2) == counts  # The model is complete, so no process starts.
    assert run.events == []


# --- by forked ranks ------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(forked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes several processes use FSDP2."""
    launch = ranks.launch

    def with_shards(command: list[str], *rest: Any, **named: Any) -> Any:
        return launch([*command[:-1], "sharded_on_cpu"], *rest, **named)

    def lay_out(config: TrainConfig, *_: Any) -> ProcessLayout:
        return ProcessLayout(config.processes, "fsdp2") if config.processes != "auto" else ProcessLayout()

    monkeypatch.setattr(ranks, "launch", with_shards)
    monkeypatch.setattr(stage, "lay_out", lay_out)


@pytest.mark.parametrize("changed", [{"gradient_checkpointing": True}, {"lora": LoraConfig(r=2)}], ids=str)
@pytest.mark.usefixtures("forked")
def test_ddp(run: Stage, tmp_path: Path, changed: dict[str, Any]) -> None:
    run(**changed, **TWO)
    (tmp_path / "alone").mkdir()
    one = Stage(run.policy, run.pairs, tmp_path / "alone")
    one(**changed)
    assert max_abs_diff(run.weights(), one.weights()) < NEAR


@pytest.mark.parametrize("kind", ["forked", "sharded"])
def test_labels_and_weights_of_pairs(
    run: Stage, pairs: pl.DataFrame, tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    """Each rank has the terms of its own pairs."""
    request.getfixturevalue(kind)
    labels = pl.Series("soft_label", [0.9, 0.6, 0.7, 0.99, 0.55, 0.8, 0.95, 0.65])
    labeled = pairs.with_columns(labels, margin=pl.int_range(1, 9).cast(pl.Float32))
    # With Adam, a gradient that is zero but for rounding moves a weight by the learning rate, in either direction.
    changed = {"method": "soft", "weight_column": "margin", "sft_weight": 0.2, "max_steps": 3, "optim": "sgd"}
    changed["learning_rate"] = 0.1
    run(labeled, processes=2, **changed)
    single = Stage(run.policy, labeled, tmp_path / "single")
    single.folder.mkdir()
    single(labeled, **changed)
    assert max_abs_diff(run.weights(), single.weights()) < NEAR
    assert max_abs_diff(run.weights(), load_file(run.policy / "model.safetensors")) > 1e-3


@pytest.mark.usefixtures("sharded")
def test_fsdp2(run: Stage, alone: Stage) -> None:
    counts = run(**TWO)
    assert max_abs_diff(run.weights(), alone.weights()) < NEAR
    assert counts["step0_max_abs_difference"] < 1e-4
    assert (run.model / "config.json").read_text() == (alone.model / "config.json").read_text()
    assert run.steps() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("kind", ["forked", pytest.param("sharded", marks=pytest.mark.long)])
def test_ranks_that_are_asked_to_stop_write_a_checkpoint_of_one_step(
    run: Stage, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    request.getfixturevalue(kind)
    long = {**TWO, "max_steps": 20}
    asked: set[int] = set()
    monkeypatch.setattr(launcher, "is_asked_to_stop", lambda: bool(asked))
    run.on_step = lambda step: asked.add(step) if step == 3 else None
    with pytest.raises(StoppedTrainingError, match=r"has written its checkpoint of step \d+ of 20"):
        run(**long)
    stopped = max(run.steps())
    assert 3 <= stopped < 20
    assert is_trained(run.out / f"checkpoints/checkpoint-{stopped}", run.job(**long).key())
    asked.clear()
    run(**long)
    assert run.steps() == list(range(stopped + 1, 21))
    undisturbed = Stage(run.policy, run.pairs, tmp_path / "undisturbed")
    undisturbed.folder.mkdir()
    undisturbed(**long)
    assert max_abs_diff(run.weights(), undisturbed.weights()) == 0


@pytest.mark.long
@pytest.mark.usefixtures("sharded")
def test_fsdp2_with_activation_checkpointing_and_accumulation(run: Stage, tmp_path: Path) -> None:
    run(gradient_checkpointing=True, batch_size=8, **TWO)
    (tmp_path / "alone").mkdir()
    one = Stage(run.policy, run.pairs, tmp_path / "alone")
    one(batch_size=8)
    assert max_abs_diff(run.weights(), one.weights()) < NEAR


@pytest.mark.long
@pytest.mark.usefixtures("sharded")
def test_fsdp2_of_tied_embeddings(tmp_path: Path) -> None:
    policy = make_qwen2(tmp_path / "qwen2")
    two, one = (Stage(policy, scored_pairs(policy, 8), tmp_path / name) for name in ("two", "one"))
    for run in (two, one):
        run.folder.mkdir()
    two(**TWO)
    one()
    assert "lm_head.weight" not in two.weights()
    assert max_abs_diff(two.weights(), one.weights()) < 1e-5
    assert AutoModelForCausalLM.from_pretrained(two.model).lm_head.weight.isfinite().all()


@pytest.mark.long
@pytest.mark.usefixtures("sharded")
def test_fsdp2_in_bfloat16_saves_the_stored_type(llama: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy"
    AutoModelForCausalLM.from_pretrained(llama).to(torch.bfloat16).save_pretrained(policy)
    AutoTokenizer.from_pretrained(llama).save_pretrained(policy)
    models = ModelConfig(device="cpu", dtype="bfloat16")
    pairs = token_pairs(8)
    logps = score_pairs(ScoreConfig(token_budget=4096), models, policy=policy, pairs=pairs)
    pairs = pairs.with_columns(ref_chosen_logps=logps["chosen_logp"], ref_rejected_logps=logps["rejected_logp"])
    run = Stage(policy, pairs, tmp_path)
    run.models = models
    counts = run(**TWO)
    assert counts["final_loss"] < 0.5 * math.log(2)
    assert {value.dtype for value in run.weights().values()} == {torch.bfloat16}
    assert read_json(run.model / "config.json")["dtype"] == "bfloat16"
    assert max_abs_diff(run.weights(), load_file(policy / "model.safetensors")) > 0


@pytest.mark.usefixtures("sharded")
def test_fsdp2_has_no_reference_model_and_sums_in_float32(
    run: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    launch = ranks.launch
    setup: dict[str, Any] = {}

    def launch_inspection(command: list[str], ranks: int, work: functools.partial[Any], **named: Any) -> Any:
        inspection = functools.partial(sharded_on_cpu.inspect_setup, *work.args, **work.keywords)
        setup.update(launch(command, ranks, inspection, **named))
        raise KeyboardInterrupt

    monkeypatch.setattr(ranks, "launch", launch_inspection)
    run.models = ModelConfig(device="cpu", dtype="bfloat16")
    with pytest.raises(KeyboardInterrupt):
        run(step0_tolerance=1.0, **TWO)
    assert setup == {
        "models_loaded": 1,
        "hashes": 0,
        "reference": None,
        "sharded": True,
        "log_probs": "torch.float32",
        "parameters": ["torch.float32"],
        "computed_in": "torch.bfloat16",
        "reduced_in": "torch.float32",
        "held_by_each": 0.5,
    }


@pytest.mark.usefixtures("sharded")
def test_fsdp2_resumes_from_a_checkpoint(run: Stage, alone: Stage) -> None:
    run.interrupt(at=5, save_steps=2, **TWO)
    checkpoints = run.out / "checkpoints"
    for file in checkpoints.glob("checkpoint-*"):
        stamp = read_json(file / "dice.json")
        assert (stamp["key"], stamp["layout"]) == (run.job(save_steps=2, **TWO).key(), "fsdp2 of 2")
        assert {Path(name).suffix for name in stamp["files"]} >= {".distcp", ".json"}  # of both ranks
    assert not run.model.exists()
    run(save_steps=2, **TWO)
    assert run.steps() == [5, 6]
    assert ("note", {"text": "training resumes from checkpoint-4"}) in run.events
    assert max_abs_diff(run.weights(), alone.weights()) < NEAR
    assert not checkpoints.exists()


@pytest.mark.long
@pytest.mark.usefixtures("sharded")
def test_one_process_ignores_a_checkpoint_in_shards(run: Stage, alone: Stage) -> None:
    run.interrupt(at=3, save_steps=2, **TWO)
    assert run(save_steps=None)["steps"] == 6
    assert run.steps() == [1, 2, 3, 4, 5, 6]
    assert max_abs_diff(run.weights(), alone.weights()) == 0


@pytest.mark.long
@pytest.mark.usefixtures("forked")
def test_one_process_resumes_from_a_checkpoint_of_ddp(run: Stage, alone: Stage) -> None:
    run.interrupt(at=5, save_steps=2, **TWO)
    run(save_steps=2)
    assert run.steps() == [5, 6]
    assert max_abs_diff(run.weights(), alone.weights()) < NEAR


# Rank 1 alone checks row 1. The reported loss is the mean over all eight pairs.
ROW_1 = pl.int_range(pl.len()) == 1


@pytest.mark.parametrize("kind", ["forked", "sharded"])
def test_wrong_reference_in_the_share_of_one_rank_stops_at_step_0(
    run: Stage, kind: str, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(kind)
    wrong = run.pairs.with_columns(ref_chosen_logps=pl.col("ref_chosen_logps") + pl.when(ROW_1).then(2).otherwise(0))
    with pytest.raises(DataError, match=r"loss at step 0 is 0\.7062\d, not ln 2 = 0\.69315.*differs by up to 2\)"):
        run(wrong, **TWO)
    assert run.steps() == []
    assert not run.model.exists()


@pytest.mark.long
@pytest.mark.usefixtures("forked")
def test_offset_that_leaves_the_loss_at_ln_2_stops_at_step_0(run: Stage) -> None:
    columns = ["ref_chosen_logps", "ref_rejected_logps"]
    wrong = run.pairs.with_columns(pl.col(name) + pl.when(ROW_1).then(3).otherwise(0) for name in columns)
    with pytest.raises(DataError, match=r"a response's log-probability differs by 3 .*though the loss is ln 2"):
        run(wrong, **TWO)
    assert not run.model.exists()


@pytest.mark.long
@pytest.mark.usefixtures("sharded")
def test_rank_without_a_share_takes_part_in_step_0(run: Stage) -> None:
    counts = run(step0_pairs=1, max_steps=1, **TWO)
    assert counts["step0_loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.long
@pytest.mark.usefixtures("sharded")
def test_weights_that_are_not_finite_are_not_saved(run: Stage) -> None:
    with pytest.raises(DataError, match="weights that are not finite"):
        run(learning_rate=1e38, optim="sgd", max_grad_norm=1e30, max_steps=2, **TWO)
    assert not run.model.exists()


def test_rank_that_is_killed_is_a_failure(run: Stage, forked: int) -> None:
    def kill_one(step: int) -> None:
        if step == 2:
            ranks = Path(f"/proc/{forked}/task/{forked}/children").read_text().split()
            os.kill(int(ranks[-1]), signal.SIGKILL)

    run.on_step = kill_one
    with pytest.raises(OutOfMemoryError, match=r"rank \d of the training was killed \(signal 9") as caught:
        run(num_train_epochs=1000.0, **TWO)
    assert caught.value.exit_code == 4
    assert not is_trained(run.model, run.job(num_train_epochs=1000.0, **TWO).key())
    assert not run.model.exists()


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed (pip install deepspeed)")
def test_zero3(run: Stage, alone: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = ranks.launch

    def with_zero(command: list[str], *rest: Any, **named: Any) -> Any:
        return launch([*command[:-1], "sharded_on_cpu"], *rest, **named)

    monkeypatch.setattr(ranks, "launch", with_zero)
    monkeypatch.setattr(stage, "lay_out", lambda config, *_: ProcessLayout(2, "zero3"))
    monkeypatch.setenv("PYTHONPATH", child_environment()["PYTHONPATH"])
    run(**TWO)
    assert max_abs_diff(run.weights(), alone.weights()) < NEAR
    assert (run.model / "config.json").read_text() == (alone.model / "config.json").read_text()
