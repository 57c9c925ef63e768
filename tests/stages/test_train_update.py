"""Training that changes nothing is an error, small updates outlast rounding, and the final loss is that of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import make_llama, make_qwen2
from tiny_sets import CPU, scored_pairs
from tiny_training import PAIRS, Stage
from transformers import AutoModelForCausalLM

from dice_py.config.training import LoraConfig, TrainConfig
from dice_py.errors import UsageError
from dice_py.models.checkpoint import check_checkpoint
from dice_py.models.comparison import check_distinct
from dice_py.models.identity import model_identity
from dice_py.storage.integrity import MODEL_STAMP
from dice_py.training import checkpoints
from dice_py.training.log import read_training_log

pytestmark = pytest.mark.slow


@pytest.fixture
def run(llama: Path, pairs: pl.DataFrame, tmp_path: Path) -> Stage:
    return Stage(llama, pairs, tmp_path)


@pytest.fixture
def in_bfloat16(tmp_path: Path) -> Stage:
    """A stage whose policy is stored in bfloat16."""
    policy = make_llama(tmp_path / "policy")
    AutoModelForCausalLM.from_pretrained(policy).to(torch.bfloat16).save_pretrained(policy)
    return Stage(policy, scored_pairs(policy, PAIRS), tmp_path)


def notes(run: Stage) -> str:
    return " ".join(fields["text"] for event, fields in run.events if event == "note")


def test_a_warm_up_longer_than_the_run_is_warned_of_and_a_policy_that_stays_is_an_error(run: Stage) -> None:
    # The first step of a warm-up has a learning rate of 0.
    with pytest.raises(UsageError, match=r"changed no weight.*train\.learning_rate is 0\.001.*1 step.*warmup_steps=50"):
        run(warmup_steps=50, max_steps=1)
    assert "warning: train.warmup_steps is 50, and the training has 1 step" in notes(run)
    assert not run.model.exists()


def test_the_default_warm_up_trains_in_a_single_step(run: Stage, llama: Path) -> None:
    defaults = {"warmup_steps": TrainConfig().warmup_steps, "learning_rate": TrainConfig().learning_rate}
    counts = run(max_steps=1, lr_scheduler_type=TrainConfig().lr_scheduler_type, **defaults)
    assert "no warm-up" in notes(run)
    assert counts["saved_dtype"] == "float32"
    assert 0 < counts["update_rms"] < 1e-6
    start = load_file(llama / "model.safetensors")
    assert any(not torch.equal(value, start[name]) for name, value in run.weights().items())


@pytest.mark.parametrize("lora", [None, LoraConfig(r=4)], ids=["full", "lora"])
def test_an_update_that_bfloat16_would_round_away_is_kept_in_float32(
    in_bfloat16: Stage, lora: LoraConfig | None
) -> None:
    run = in_bfloat16
    if lora is not None:
        run.models = run.models.model_copy(update={"dtype": "bfloat16"})  # the frozen base is in the computing dtype
    counts = run(max_steps=2, learning_rate=5e-7 if lora is None else 1e-5, lora=lora)
    assert counts["saved_dtype"] == "float32"
    assert "the policy is saved in float32" in notes(run)
    start, trained = load_file(run.policy / "model.safetensors"), run.weights()
    assert all(value.dtype == torch.float32 for value in trained.values())
    changed = [name for name, value in trained.items() if not torch.equal(value, start[name].float())]
    assert len(changed) >= (10 if lora is None else 7)
    assert json.loads((run.model / "config.json").read_text(encoding="utf-8"))["dtype"] == "float32"
    # By the stamp the next round knows that it is no rounded copy of its start.
    assert json.loads((run.model / MODEL_STAMP).read_text(encoding="utf-8"))["start"] == model_identity(run.policy)
    check_distinct(run.model, run.policy, allowed=False)


def test_a_large_update_is_saved_as_the_start_is(in_bfloat16: Stage) -> None:
    counts = in_bfloat16(max_steps=3, learning_rate=1e-2)
    assert counts["saved_dtype"] == "bfloat16"
    assert all(value.dtype == torch.bfloat16 for value in in_bfloat16.weights().values())


def test_rounding_that_is_asked_for_is_warned_of(in_bfloat16: Stage) -> None:
    counts = in_bfloat16(max_steps=1, learning_rate=1e-7, save_dtype="stored")
    assert counts["saved_dtype"] == "bfloat16"
    assert "warning: rounding to bfloat16" in notes(in_bfloat16)


def test_the_final_loss_and_the_log_are_the_same_after_a_resume(run: Stage, tmp_path: Path) -> None:
    """Checkpoints at steps that are no multiple of logging_steps, and a last step that is none either."""
    settings: dict[str, Any] = {"save_steps": 3, "logging_steps": 2, "max_steps": 5}
    uninterrupted = Stage(run.policy, run.pairs, tmp_path / "uninterrupted")
    uninterrupted.folder.mkdir()
    want = uninterrupted(**settings)
    run.interrupt(at=4, **settings)
    assert run(**settings) == want
    logs = [json.loads((stage.model / "train_log.json").read_text(encoding="utf-8")) for stage in (run, uninterrupted)]
    first, second = ([(entry["step"], entry["loss"]) for entry in log if "loss" in entry] for log in logs)
    assert first == second
    assert [step for step, _ in first] == [2, 3, 4, 5]
    assert read_training_log(run.out) == read_training_log(uninterrupted.out)
    files = [(stage.out / "log.jsonl").read_bytes() for stage in (run, uninterrupted)]
    assert files[0] == files[1]
    assert files[0].count(b"\n") == 5
    assert want["final_loss"] == pytest.approx((first[-1][1] + first[-2][1]) / 2)


def test_a_run_shorter_than_logging_steps_has_a_final_loss(run: Stage) -> None:
    assert run(max_steps=1, logging_steps=10)["final_loss"] == pytest.approx(0.6931, abs=1e-3)


def test_lora_on_one_of_two_tied_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The saved policy is the one that was trained: its head and embeddings are no longer tied."""
    policy = make_qwen2(tmp_path / "policy")
    run, ids, trained = Stage(policy, scored_pairs(policy, PAIRS), tmp_path), torch.arange(6, 30)[None], []
    merge = checkpoints.merge

    def watched(model: Any) -> Any:
        with torch.no_grad():
            trained.append(model.eval()(ids).logits)
        return merge(model)

    monkeypatch.setattr(checkpoints, "merge", watched)
    run(lora=LoraConfig(r=4, target_modules=["embed_tokens"]), learning_rate=1e-2, max_steps=2)
    saved = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32)
    assert not saved.config.tie_word_embeddings
    with torch.no_grad():
        assert torch.allclose(saved(ids).logits, trained[0], atol=1e-4)
        start = AutoModelForCausalLM.from_pretrained(policy)(ids).logits
    assert (trained[0] - start).abs().max() > 0.01
    check_checkpoint(run.model, "policy", CPU)


@pytest.mark.parametrize("setting", ["learning_rate", "max_grad_norm"])
def test_settings_that_leave_the_policy_next_to_its_start_are_warned_of(run: Stage, setting: str) -> None:
    counts = run(max_steps=2, **{setting: 1e-30})
    assert "warning: no weight of the policy changed by more than" in notes(run)
    assert counts["update_rms"] < 1e-12
