"""The adapter beside the policy: base + adapter is the policy, with rank-stabilized scales and with whole layers."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from moved_models import weights
from peft import PeftModel
from safetensors.torch import load_file
from tiny_sets import CPU
from tiny_training import Stage
from transformers import AutoModelForCausalLM

from dice_py.config.training import LoraConfig, TrainConfig
from dice_py.models.identity import model_identity
from dice_py.models.sources import resolve_model
from dice_py.storage.integrity import damaged_in, read_stamp

pytestmark = pytest.mark.slow

WHOLE = ["lm_head", "norm", "embed_tokens", "o_proj"]
STEPS = {"max_steps": 2, "learning_rate": 1e-2}


@pytest.fixture
def run(llama: Path, pairs: pl.DataFrame, tmp_path: Path, cache_folder: Path) -> Stage:
    return Stage(llama, pairs, tmp_path)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(40)[None]).logits


@pytest.mark.parametrize(
    ("lora", "packed"),
    [
        (LoraConfig(r=2), True),
        (LoraConfig(r=4, use_rslora=True), False),
        (LoraConfig(r=2, use_rslora=True, modules_to_save=WHOLE), True),
        (LoraConfig(r=2, modules_to_save=WHOLE), False),
    ],
    ids=["plain", "rslora", "whole", "whole, padded"],
)
def test_base_and_adapter_are_the_policy(run: Stage, llama: Path, lora: LoraConfig, packed: bool) -> None:
    run(lora=lora, packed=packed, **STEPS)
    job = run.job(lora=lora, packed=packed, **STEPS)
    base = AutoModelForCausalLM.from_pretrained(llama)
    before = logits(base)
    loaded = logits(PeftModel.from_pretrained(base, job.adapter))
    saved = logits(AutoModelForCausalLM.from_pretrained(run.model))
    assert (saved - before).abs().max() > 0.1
    assert torch.allclose(loaded, saved, atol=1e-4)
    # The same, as the project merges adapters of others.
    merged = weights(resolve_model(str(job.adapter), None, role="--policy"))
    for name, value in run.weights().items():
        assert torch.allclose(merged[name], value, atol=1e-6), name
    settings = json.loads((job.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["base_model_name_or_path"] == str(llama.resolve())
    assert settings["use_rslora"] == lora.use_rslora
    assert settings["target_modules"] == sorted(settings["target_modules"])


@pytest.mark.parametrize("stabilized", [False, True])
def test_the_scale(run: Stage, llama: Path, stabilized: bool) -> None:
    lora = LoraConfig(r=4, alpha=8, target_modules=["q_proj"], use_rslora=stabilized)
    run(lora=lora, **STEPS)
    stored, before, after = load_file(run.out / "adapter" / "adapter_model.safetensors"), weights(llama), run.weights()
    scale = 8 / math.sqrt(4) if stabilized else 8 / 4
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.q_proj"
        a, b = (stored[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        assert b.abs().max() > 0
        assert torch.allclose(after[f"{name}.weight"], before[f"{name}.weight"] + scale * b @ a, atol=1e-6)
    assert [name for name in before if not torch.equal(before[name], after[name])] == [
        f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)
    ]


def test_whole_layers_are_trained_alike_on_packed_and_padded_rows(run: Stage, llama: Path) -> None:
    lora, found = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=WHOLE), []
    for packed in (True, False):
        run(lora=lora, packed=packed, learning_rate=1e-3, max_steps=2)
        found.append(run.weights())
    before = weights(llama)
    moved = {name for name in before if not torch.equal(before[name], found[0][name])}
    whole = {"lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"}
    whole |= {f"model.layers.{layer}.self_attn.o_proj.weight" for layer in range(2)}
    # "norm" is the last one alone, not each layer's input_layernorm.
    assert moved == whole | {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)}
    for name in moved:
        # Adam's first steps are of one size, whatever the gradient's: where it is near 0, rounding decides the sign.
        differ = (found[0][name] - found[1][name]).abs() > 1e-5
        assert differ.float().mean() < 0.01, name


def test_whole_layers_of_a_bfloat16_model_are_trained_in_float32(run: Stage, llama: Path) -> None:
    run.models = CPU.model_copy(update={"dtype": "bfloat16"})
    for packed in (True, False):
        lora = LoraConfig(r=2, modules_to_save=WHOLE)
        # In bfloat16 an update of 1e-6 would leave weights near 1 as they are.
        counts = run(lora=lora, packed=packed, learning_rate=1e-6, max_steps=2)
        assert abs(counts["step0_loss"] - math.log(2)) < 0.02
        stored = load_file(run.out / "adapter" / "adapter_model.safetensors")
        assert {value.dtype for value in stored.values()} == {torch.float32}
        after = run.weights()
        moved = (after["model.norm.weight"] - weights(llama)["model.norm.weight"]).abs()
        assert 1e-7 < moved.max() < 1e-4


def test_a_resumed_training_has_the_whole_layers_too(run: Stage) -> None:
    settings: dict[str, Any] = {"lora": LoraConfig(r=2, modules_to_save=WHOLE), "save_steps": 2, "max_steps": 4}
    run(**settings)
    expected = load_file(run.out / "adapter" / "adapter_model.safetensors")
    shutil.rmtree(run.out)
    run.interrupt(3, **settings)
    run(**settings)
    assert run.steps() == [3, 4]
    found = load_file(run.out / "adapter" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-6), name


def test_a_training_without_its_adapter_folder_is_kept(run: Stage, llama: Path) -> None:
    settings = {"lora": LoraConfig(r=2), **STEPS}
    run(**settings)
    job = run.job(**settings)
    stamp = read_stamp(job.adapter)
    assert stamp is not None
    assert (stamp["key"], stamp["start"]) == (job.key(), model_identity(llama))
    assert damaged_in(job.adapter) == []
    shutil.rmtree(job.adapter)  # as an earlier version left it, or a person who needed the space
    made = (run.model / "model.safetensors").stat().st_ino
    assert job.run().files == [(run.model, job.key())]
    assert (run.model / "model.safetensors").stat().st_ino == made


def test_an_adapter_of_other_origin_is_not_lost(run: Stage) -> None:
    adapter = run.out / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "mine.txt").write_text("kept")
    run(lora=LoraConfig(r=2), **STEPS)
    assert (adapter.with_name("adapter.damaged") / "mine.txt").read_text() == "kept"
    # A training of all weights in the same place has none.
    run(max_steps=1)
    assert not adapter.exists()


def test_new_settings_at_their_defaults_are_in_no_key() -> None:
    """A run of an earlier version goes on without training again."""
    fields = TrainConfig(lora=LoraConfig(r=2)).key_fields()["lora"]
    assert fields == {"r": 2, "alpha": 32, "dropout": 0.0, "target_modules": "all-linear"}
    fields = TrainConfig(lora=LoraConfig(r=2, use_rslora=True, modules_to_save=["norm"])).key_fields()["lora"]
    assert (fields["use_rslora"], fields["modules_to_save"]) == (True, ["norm"])
