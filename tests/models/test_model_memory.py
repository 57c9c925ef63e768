"""A model's size from its files, and the peak memory of each stage by hand."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from plan_data import GIB, SIZE, own, write_weights

from dice_py.config.training import LoraConfig, TrainConfig
from dice_py.errors import DataError
from dice_py.models.memory import (
    TrainingMemory,
    checkpoint_bytes,
    generate_memory,
    lora_parameters,
    score_memory,
    train_memory,
    train_state,
)
from dice_py.models.sizes import ModelSize, model_size


def test_a_models_size_from_headers_alone(tmp_path: Path) -> None:
    shape = {
        "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 16, "vocab_size": 50,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({**shape, "dtype": "bfloat16"}))
    write_weights(
        tmp_path / "a.safetensors", {"__metadata__": {"format": "pt"}, "w": {"dtype": "BF16", "shape": [50, 8]}}
    )
    write_weights(tmp_path / "b.safetensors", {"v": {"dtype": "BF16", "shape": [3]}})
    size = model_size(tmp_path)
    assert (size.parameters, size.layers, size.kv_heads, size.head_size) == (403, 2, 2, 2)
    assert size.kv_bytes_per_token == 2 * 2 * 2 * 2
    assert size.stored_bytes == sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    # A setting that is not a size is not part of the shape.
    (tmp_path / "config.json").write_text(json.dumps({**shape, "dtype": "float32", "use_cache": False}))
    assert model_size(tmp_path).shape == size.shape
    (tmp_path / "config.json").write_text(json.dumps({**shape, "num_hidden_layers": 3}))
    assert model_size(tmp_path).shape != size.shape


@pytest.mark.parametrize(
    "config",
    [
        {"n_embd": 8, "n_layer": 2, "n_head": 4, "n_inner": None},  # GPT-2, GPT-J, CodeGen
        {"d_model": 8, "n_layers": 2, "n_heads": 4},  # MPT
        {"hidden_size": 8, "n_layer": 2, "n_head": 4},  # BLOOM
        {"hidden_size": 8, "num_layers": 2, "num_heads": 4},  # GPT-Neo
        {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 32},  # OPT
        {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": [16, 32]},  # Gemma 3n
        {"text_config": {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": [4, 2]}},
    ],
)
def test_sizes_that_families_name_in_their_own_way(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    size = model_size(tmp_path)
    assert (size.hidden, size.layers, size.heads, size.kv_heads, size.head_size, size.inner) == (8, 2, 4, 4, 2, 32)


@pytest.mark.parametrize("value", ["many", None, [], {}, ["a"]])
def test_sizes_that_are_no_numbers(tmp_path: Path, value: Any) -> None:
    """What is wrong with the config is models/checkpoint.py's to say."""
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": value, "text_config": value, "n_layer": 3}))
    assert (model_size(tmp_path).hidden, model_size(tmp_path).layers) == (0, 3)


def test_truncated_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 900) + b"{")
    with pytest.raises(DataError, match=r"model\.safetensors is not a complete safetensors file"):
        model_size(tmp_path)


def test_memory_by_hand() -> None:
    config = own(
        "generate.token_budget=100", "generate.max_new_tokens=10", "score.token_budget=64",
        "generate.vllm.gpu_memory_utilization=0.5",
    )  # fmt: skip
    # 5 rows of 20 tokens, 16 values each in 4 bytes; 20 bytes for each of 50 logits.
    assert generate_memory(SIZE, config, "transformers", "float32", 10, None) == 4000 + 5 * 20 * 16 * 4 + 5 * 50 * 20
    assert generate_memory(SIZE, config, "vllm", "bfloat16", 10, 1000) == 500
    assert generate_memory(SIZE, config, "vllm", "float32", 10, None) == 4000 + GIB
    larger = replace(SIZE, parameters=2000)
    assert score_memory([SIZE, larger], config, "float32", False) == 8000 + 64 * 4 * (64 + 64) + 8 * 2**20


def train(*assignments: str) -> TrainConfig:
    return own(*(f"train.{assignment}" for assignment in assignments)).train


# A layer of SIZE: hidden size 8, inner width 16, queries of 8, keys of 4, in float32.
LAYER = 25 * 8 + 4 * (4 * 16 + 3.2 * 12)


def test_training_by_hand() -> None:
    state, head = 16_000, 2 * 4 * 60 * 50
    assert train_memory(SIZE, train(), "float32", 60, shards=1, cuda=False) == state + int(60 * 2 * LAYER) + head
    assert train_memory(SIZE, train(), "float32", 60, shards=4, cuda=False) == 4_000 + int(60 * 2 * LAYER) + head
    lean = train_memory(SIZE, train(), "float32", 60, shards=1, cuda=False, lean=True)
    assert lean == state + int(60 * 2 * (LAYER - 8 * SIZE.hidden - 4 * 2 * SIZE.inner)) + head
    checkpointed = train_memory(SIZE, train("gradient_checkpointing=true"), "float32", 60, shards=1, cuda=False)
    assert checkpointed == state + int(4 * 60 * 8 * 2 + 60 * LAYER) + head
    # On a GPU in 16 bit: a copy of the weights, half of what depends on the dtype, a tile, the head's gradient.
    layer = 25 * 8 + 2 * (4 * 16 + 3.2 * 12)
    on_gpu = train_memory(SIZE, train(), "bfloat16", 60, shards=1, cuda=True)
    assert on_gpu == 18_000 + int(60 * 2 * layer) + 2 * 60 * 50 + 4 * 50 * 8
    # More logits than are kept on a CPU: tiles of 4,096 positions, or fewer.
    wide = replace(SIZE, vocabulary=2**20)
    for tokens, positions in ((60, 60), (64, 64), (65, 65), (9000, 4096)):
        found = train_memory(wide, train(), "float32", tokens, shards=1, cuda=False) - state
        tiles = 8 * tokens * 2**20 if tokens <= 64 else 16 * positions * 32768
        assert found == int(tokens * 2 * LAYER) + tiles


def forward(train: TrainConfig, **changed: Any) -> tuple[int, int]:
    """Tokens of the longest forward: at the peak, and at least."""
    headless = replace(SIZE, vocabulary=0)  # its logits do not grow with the tokens
    needs = TrainingMemory(headless, train, "float32", prompt=10, response=5, **changed)
    without = needs.train_at(0)
    each = (needs.train_at(1000) - without) / 1000
    return round((needs.peak() - without) / each), round((needs.least() - without) / each)


@pytest.mark.parametrize(
    ("assignments", "changed", "tokens"),
    [
        (["batch_size=8"], {}, (8 * 20, 20)),  # a pair has 10 + 2 × 5 tokens, a step 8 pairs
        (["packed_tokens=100"], {}, (100, 20)),
        (["packed_tokens=16"], {}, (20, 20)),
        (["batch_size=1024"], {}, (512, 20)),
        (["batch_size=1024"], {"cuda": True}, (4096, 20)),
        (["batch_size=1024", "packed=true"], {"processes": 2}, (512, 512)),  # which do not split their rows
        (["batch_size=8", "max_length=12"], {}, (8 * 14, 14)),
        (["packed=false"], {}, (2 * 4 * 15, 2 * 4 * 15)),
        (["packed=false", "per_device_train_batch_size=2", "max_length=12"], {}, (2 * 2 * 12, 2 * 2 * 12)),
    ],
)
def test_tokens_of_a_forward(assignments: list[str], changed: dict[str, Any], tokens: tuple[int, int]) -> None:
    assert forward(train(*assignments), **changed) == tokens


LLAMA3_8B = ModelSize(
    parameters=8_030_261_248, stored_bytes=16 * 10**9, hidden=4096, layers=32, heads=32, kv_heads=8, head_size=128,
    inner=14336, vocabulary=128256, shape="",
)  # fmt: skip


def test_what_lets_a_large_model_fit() -> None:
    needs = TrainingMemory(LLAMA3_8B, train(), "bfloat16", 500, 500, cuda=True)
    assert 18 * LLAMA3_8B.parameters < needs.least() < 165e9 < needs.peak()
    said = needs.remedy(79 * GIB)
    assert "set train.lora.r=16" in said
    few = int(said.partition("train.gradient_checkpointing=true on ")[2].split()[0])
    assert "fsdp2" in said
    assert "set train.gradient_checkpointing" not in said  # which does not suffice
    for count in (few - 1, few):
        checkpointed = replace(needs, train=train("gradient_checkpointing=true"), processes=count, shards=count)
        assert (checkpointed.least() <= 79 * GIB) == (count == few)
    assert replace(needs, train=train("lora.r=16")).least() < 79 * GIB
    assert "smaller model" in needs.remedy(GIB)


def test_training_states() -> None:
    assert train_state(SIZE, train(), "float32", 1) == 16_000
    assert train_state(SIZE, train(), "bfloat16", 1) == 18_000
    assert train_state(SIZE, train(), "bfloat16", 4) == 4_500
    # Seven matrices: queries and output 8 × 8, keys and values 8 × 4, three of 8 × 16.
    adapters = 2 * 2 * (2 * 16 + 2 * 12 + 3 * 24)
    assert lora_parameters(SIZE, LoraConfig(r=2)) == adapters
    whole = LoraConfig(r=2, modules_to_save=["lm_head", "model.embed_tokens"])
    assert lora_parameters(SIZE, whole) == adapters + 2 * SIZE.hidden * SIZE.vocabulary
    assert train_state(SIZE, train("lora.r=2"), "bfloat16", 1) == 2_000 + 16 * adapters
    assert checkpoint_bytes(SIZE, train()) == 12_000
    assert checkpoint_bytes(SIZE, train("lora.r=2")) == 12 * adapters
