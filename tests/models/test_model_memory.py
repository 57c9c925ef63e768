"""A model's size from its files, and the peak memory of each stage by hand."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from dice_py.planning.memory import (
    checkpoint_bytes,
    generate_memory,
    lora_parameters,
    score_memory,
    train_memory,
    train_state,
)
from plan_data import GIB, SIZE, own, write_weights

from dice_py.errors import DataError
from dice_py.models.sizes import model_size


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


def test_truncated_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 900) + b"{")
    with pytest.raises(DataError, match=r"model\.safetensors is not a complete safetensors file"):
        model_size(tmp_path)


def test_memory_by_hand() -> None:
    config = own(
        "generate.token_budget=100", "generate.max_new_tokens=10", "score.token_budget=64",
        "train.per_device_train_batch_size=2", "train.batch_size=4", "generate.vllm.gpu_memory_utilization=0.5",
    )  # fmt: skip
    # 5 rows of 20 tokens, 16 values each in 4 bytes; 20 bytes for each of 50 logits.
    assert generate_memory(SIZE, config, "transformers", "float32", 10, None) == 4000 + 5 * 20 * 16 * 4 + 5 * 50 * 20
    assert generate_memory(SIZE, config, "vllm", "bfloat16", 10, 1000) == 500
    assert generate_memory(SIZE, config, "vllm", "float32", 10, None) == 4000 + GIB
    larger = replace(SIZE, parameters=2000)
    assert score_memory([SIZE, larger], config, "float32", False) == 8000 + 64 * 4 * (64 + 64) + 8 * 2**20
    activations = 17 * 4 * (2 * 2 * 15) * 8 * 2
    assert train_memory(SIZE, config, "float32", 15, 1) == 16_000 + activations + 8 * 60 * 50
    assert train_memory(SIZE, config, "float32", 15, 4) == 4_000 + activations + 8 * 60 * 50
    checkpointed = config.model_copy(update={"train": config.train.model_copy(update={"gradient_checkpointing": True})})
    assert train_memory(SIZE, checkpointed, "float32", 15, 1) < train_memory(SIZE, config, "float32", 15, 1)


def test_training_states() -> None:
    config, lora = own(), own("train.lora.r=2")
    assert train_state(SIZE, config, "float32", 1) == 16_000
    assert train_state(SIZE, config, "bfloat16", 1) == 18_000
    assert train_state(SIZE, config, "bfloat16", 4) == 4_500
    # Seven matrices: queries and output 8 × 8, keys and values 8 × 4, three of 8 × 16.
    adapters = 2 * 2 * (2 * 16 + 2 * 12 + 3 * 24)
    assert lora_parameters(SIZE, 2) == adapters
    assert train_state(SIZE, lora, "bfloat16", 1) == 2_000 + 16 * adapters
    assert (checkpoint_bytes(SIZE, config), checkpoint_bytes(SIZE, lora)) == (12_000, 12 * adapters)
