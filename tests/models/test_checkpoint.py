"""Checkpoints whose weights are not what config.json describes, or that hold no causal language model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_models import CPU, WEIGHTS, as_bin, change_config, change_weights, copy_of, in_shards, refusal
from safetensors.torch import load_file
from tiny_families import NOT_PACKED, PACKED, build
from tiny_models import make_qwen2
from transformers import BertConfig, BertForMaskedLM, BertLMHeadModel, T5Config, T5ForConditionalGeneration

from dice_py.config.shared import ModelConfig
from dice_py.errors import DataError
from dice_py.models import checkpoint
from dice_py.models.checkpoint import check_checkpoint
from dice_py.models.loading import load_model

DOWN = "model.layers.1.mlp.down_proj.weight"
OUT = "model.layers.1.self_attn.o_proj.weight"
BIN = pytest.mark.parametrize("binary", [False, True], ids=["safetensors", "bin"])


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return copy_of(llama, tmp_path)


@pytest.mark.parametrize("name", [*PACKED, *NOT_PACKED])
def test_each_family_passes_as_it_is_saved(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path)
    check_checkpoint(tmp_path, "policy", CPU)


@pytest.mark.parametrize("name", ["Qwen2", "Mixtral", "GPT2", "Cohere", "DeepseekV3"])
def test_each_tensor_is_missed(name: str, tmp_path: Path) -> None:
    """Experts are stored one by one and merged at load; tied weights are stored once."""
    build(name).save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    for absent in list(weights)[:: max(1, len(weights) // 12)]:
        change_weights(tmp_path, lambda _, absent=absent: {n: w for n, w in weights.items() if n != absent})
        said = refusal(tmp_path)
        assert "missing" in said
        assert absent in said or absent.split(".")[-2] in said


@BIN
def test_a_missing_tensor_is_named(copy: Path, binary: bool) -> None:
    change_weights(copy, lambda weights: weights.pop(DOWN))
    said = refusal(as_bin(copy) if binary else copy)
    assert said.startswith(f"the model: {copy}: its weights are not those that config.json describes")
    assert f"1 missing ({DOWN})" in said


def test_load_model_fills_nothing_with_random_numbers(copy: Path) -> None:
    change_weights(copy, lambda weights: weights.pop(DOWN))
    with pytest.raises(DataError, match=f"1 missing \\({DOWN}\\)"):
        load_model(copy, CPU)


def test_load_model_refuses_other_shapes(copy: Path) -> None:
    change_config(copy, intermediate_size=64)
    with pytest.raises(DataError, match="of another shape"):
        load_model(copy, CPU)


def test_names_with_a_prefix_of_tied_weights(tmp_path: Path) -> None:
    folder = make_qwen2(tmp_path / "qwen")
    change_weights(folder, lambda weights: {f"module.{name}": value for name, value in weights.items()})
    assert refusal(folder).endswith("Each name begins with 'module.', that of a wrapper: save the model that it wraps")


@BIN
def test_names_with_a_prefix(copy: Path, binary: bool) -> None:
    change_weights(copy, lambda weights: {f"base_model.{name}": value for name, value in weights.items()})
    said = refusal(as_bin(copy) if binary else copy)
    assert "21 missing (lm_head.weight, " in said
    assert "21 that the model does not have (base_model.lm_head.weight" in said
    assert said.endswith("Each name begins with 'base_model.', that of a wrapper: save the model that it wraps")


def test_names_without_the_prefix_that_transformers_adds(copy: Path) -> None:
    """`model.` is added at load where all names but the head's lack it."""
    change_weights(copy, lambda weights: {name.removeprefix("model."): value for name, value in weights.items()})
    check_checkpoint(copy, "policy", CPU)
    load_model(copy, CPU)


def test_a_tensor_too_many(copy: Path) -> None:
    change_weights(copy, lambda weights: weights.update({"score.weight": torch.ones(1, 64)}))
    assert "1 that the model does not have (score.weight [1, 64])" in refusal(copy)


@pytest.mark.parametrize("name", ["self_attn.rotary_emb.inv_freq", "attn.masked_bias", "attention.bias"])
def test_buffers_of_older_versions_are_no_fault(copy: Path, name: str) -> None:
    change_weights(copy, lambda weights: weights.update({f"model.layers.0.{name}": torch.ones(1, 1, 4, 4)}))
    check_checkpoint(copy, "policy", CPU)
    load_model(copy, CPU)


def test_parts_of_a_model_of_images_are_no_fault(copy: Path) -> None:
    """The text model of a checkpoint that sees too; without a config of its sight they are."""
    change_weights(copy, lambda weights: weights.update({"vision_tower.layers.0.weight": torch.ones(4)}))
    assert "1 that the model does not have (vision_tower.layers.0.weight [4])" in refusal(copy)
    change_config(copy, vision_config={"hidden_size": 4})
    check_checkpoint(copy, "policy", CPU)


@BIN
def test_another_shape_is_told_with_both(copy: Path, binary: bool) -> None:
    change_config(copy, intermediate_size=128)
    said = refusal(as_bin(copy) if binary else copy)
    assert said.count("of another shape") == 1
    assert "6 of another shape (" in said
    assert "model.layers.0.mlp.down_proj.weight is [64, 96], not [64, 128]" in said


def test_a_tensor_in_two_shards(copy: Path) -> None:
    first, second = in_shards(copy)
    change_weights(copy, lambda weights: weights.update({DOWN: load_file(second)[DOWN]}), name=first.name)
    assert f"{DOWN} in two files of weights" in refusal(copy)


@BIN
def test_tied_weights_may_be_stored_twice_if_they_are_equal(tmp_path: Path, binary: bool) -> None:
    folder = make_qwen2(tmp_path / "qwen")
    change_weights(folder, lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"] * 1}))
    check_checkpoint(as_bin(folder) if binary else folder, "policy", CPU)


@BIN
def test_tied_weights_that_differ(tmp_path: Path, binary: bool) -> None:
    """transformers would score with the stored head, vLLM sample with the embeddings."""
    folder = make_qwen2(tmp_path / "qwen")
    change_weights(folder, lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"] * 2}))
    said = refusal(as_bin(folder) if binary else folder)
    assert "config.json says that lm_head.weight and model.embed_tokens.weight are one tensor" in said
    check_checkpoint(change_config(folder, tie_word_embeddings=False), "policy", CPU)


# --- values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_single_value_that_is_not_finite(copy: Path, dtype: torch.dtype, value: float) -> None:
    def change(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        changed = {name: weight.to(dtype) for name, weight in weights.items()}
        changed[DOWN][-1, -1] = value
        return changed

    said = refusal(change_weights(copy, change))
    assert f"1 tensors hold NaN or infinite numbers ({DOWN})" in said


def test_the_largest_numbers_are_finite(copy: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        changed = {name: weight.to(torch.bfloat16) for name, weight in weights.items()}
        changed[DOWN][0, 0] = torch.finfo(torch.bfloat16).max
        changed[DOWN][0, 1] = torch.finfo(torch.bfloat16).min
        return changed

    check_checkpoint(change_weights(copy, change), "policy", CPU)


def test_values_of_a_binary_file(copy: Path) -> None:
    change_weights(copy, lambda weights: weights[DOWN].fill_(float("nan")))
    assert f"pytorch_model.bin: 1 tensors hold NaN or infinite numbers ({DOWN})" in refusal(as_bin(copy))


@pytest.mark.parametrize(
    ("zeros", "said"),
    [
        (lambda name: True, r"16 of 16 matrices hold nothing but zeros \(.*embed_tokens\.weight.*100% of their values"),
        (lambda name: name.startswith("lm_head"), r"1 of 16 matrices .* \(lm_head\.weight\)"),
        (lambda name: ".layers.1." in name, r"7 of 16 matrices .*layers\.1\.mlp\.down_proj\.weight"),
    ],
)
@pytest.mark.parametrize("pickled", [False, True])
def test_weights_that_were_never_written(copy: Path, zeros: Callable[[str], bool], said: str, pickled: bool) -> None:
    change_weights(copy, lambda weights: [weight.zero_() for name, weight in weights.items() if zeros(name)])
    assert re.search(said, refusal(as_bin(copy) if pickled else copy))


def test_the_end_of_a_file_that_was_never_written(copy: Path) -> None:
    content = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(content[: len(content) // 2].ljust(len(content), b"\0"))
    assert "they were never written, as where a download" in refusal(copy)


def test_a_block_that_was_added_may_begin_with_zeros(copy: Path) -> None:
    """As LLaMA Pro's: the block then changes nothing until it is trained. So may biases and norms."""
    change_weights(copy, lambda weights: [weights[name].zero_() for name in ("model.norm.weight", OUT)])
    check_checkpoint(copy, "policy", CPU)


def test_integers_in_place_of_weights(copy: Path) -> None:
    change_weights(copy, lambda weights: weights.update({DOWN: (weights[DOWN] * 10).to(torch.int8)}))
    assert "a quantized model" in refusal(copy)
    assert "a quantized model" in refusal(as_bin(copy))


def test_code_in_a_binary_file_is_not_run(copy: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    as_bin(copy)
    torch.save({"model.embed_tokens.weight": Evil()}, copy / "pytorch_model.bin")
    assert "code in it is never run" in refusal(copy)
    assert not (tmp_path / "ran").exists()


# --- what is no causal language model, and config.json


def small(kind: Any, **changes: Any) -> Any:
    return kind(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, **changes)


def test_encoders(tmp_path: Path) -> None:
    BertForMaskedLM(small(BertConfig, intermediate_size=16)).save_pretrained(tmp_path)
    assert "the model is a BertForMaskedLM, which does not generate text" in refusal(tmp_path)
    change_config(tmp_path, architectures=["BertModel"])
    assert "a model of type 'bert', which is no causal language model" in refusal(tmp_path)


def test_an_encoder_that_was_made_a_decoder(tmp_path: Path) -> None:
    BertLMHeadModel(small(BertConfig, intermediate_size=16, is_decoder=True)).save_pretrained(tmp_path)
    check_checkpoint(tmp_path, "policy", CPU)


def test_an_encoder_and_decoder(tmp_path: Path) -> None:
    shape = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(**shape)).save_pretrained(tmp_path)
    assert "a model of type 't5', which is no causal language model" in refusal(tmp_path)


def test_a_model_of_images_and_text(copy: Path) -> None:
    change_config(copy, model_type="llava", text_config={"num_hidden_layers": 2}, vision_config={})
    assert "a model of type 'llava', which reads more than text" in refusal(copy)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llamango"}, "knows no model_type 'llamango'"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"num_attention_heads": 3}, "config.json"),
        ({"num_attention_heads": "many"}, "config.json"),
        ({"hidden_size": -64}, "config.json"),
        ({"hidden_act": "strange"}, "config.json"),
        ({"num_hidden_layers": 10**9}, "config.json says num_hidden_layers=1000000000, but the folder holds only 21"),
        ({"num_hidden_layers": 1}, "that the model does not have (model.layers.1."),
        ({"num_hidden_layers": 3}, "9 missing (model.layers.2."),
        ({"vocab_size": 300}, "not [300, 64]"),
        ({"vocab_size": 0}, "config.json"),
        ({"rope_scaling": "x"}, "config.json"),
        ({"layer_types": ["full_attention"]}, "config.json"),
    ],
)
def test_config_nonsense(copy: Path, changes: dict[str, Any], words: str) -> None:
    assert words in refusal(change_config(copy, **changes))


def test_code_of_the_models_own(copy: Path) -> None:
    """It is named without being run."""
    change_config(copy, model_type="mine", auto_map={"AutoConfig": "code.MineConfig"})
    (copy / "code.py").write_text("raise SystemExit('it ran')\n")
    assert "--set model.trust_remote_code=true" in refusal(copy, 2)


@pytest.mark.parametrize("content", ["[]", '{"eos_token_id": 4,', "\xff", "null", '"x"'])
def test_a_broken_generation_config(copy: Path, content: str) -> None:
    (copy / "generation_config.json").write_bytes(content.encode("latin-1"))
    assert "generation_config.json" in refusal(copy)


# --- what this machine lacks


@pytest.mark.parametrize("name", ["flash_attention_2", "flash", "flash_attention_3", "nobody/kernel"])
def test_attention_that_is_not_here(llama: Path, name: str) -> None:
    said = refusal(llama, 2, ModelConfig(device="cpu", attn_implementation=name))
    assert f"model.attn_implementation is '{name}', which cannot be used here: " in said


def test_attention_that_config_json_names(copy: Path) -> None:
    """Another may be asked for instead."""
    change_config(copy, attn_implementation="flash_attention_2")
    assert "choose another with --set model.attn_implementation=sdpa" in refusal(copy, 2)
    sdpa = ModelConfig(device="cpu", attn_implementation="sdpa")
    check_checkpoint(copy, "policy", sdpa)
    assert load_model(copy, sdpa).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_attention_that_is_here(llama: Path, name: str) -> None:
    check_checkpoint(llama, "policy", ModelConfig(device="cpu", attn_implementation=name))


@pytest.mark.parametrize("name", ["quantum", "cuda:99", "cuda:x", "meta", "mps", ""])
def test_devices(llama: Path, name: str) -> None:
    assert f"model.device is {name!r}" in refusal(llama, 2, ModelConfig(device=name))


# --- what was checked


def test_a_model_that_passed_is_not_built_again(
    copy: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_checkpoint(copy, "policy", CPU)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "compare_weights", lambda *_: pytest.fail("compared again"))
        check_checkpoint(copy, "reference", CPU)
        copy.rename(copy.with_name("renamed"))
        check_checkpoint(copy.with_name("renamed"), "policy", CPU)
    renamed = change_config(copy.with_name("renamed"), intermediate_size=128)
    assert "of another shape" in refusal(renamed)
    assert json.loads((cache_folder / "remembered.json").read_text())["checkpoint"]
