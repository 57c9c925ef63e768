"""Training that cannot fit is refused; the devices and their memory are mocked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from plan_data import GIB, write_weights

from dice_py.config.shared import DevicesConfig, ModelConfig
from dice_py.config.training import LoraConfig, TrainConfig
from dice_py.errors import OutOfMemoryError
from dice_py.training import memory_check
from dice_py.training.memory_check import check_training_memory

GPU, CPU = ModelConfig(dtype="bfloat16"), ModelConfig(device="cpu", dtype="float32")
SHAPE = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
}  # fmt: skip


@pytest.fixture
def llama3_8b(tmp_path: Path) -> Path:
    """Its config, and a file of weights that has a header alone."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    write_weights(tmp_path / "model.safetensors", {"weights": {"dtype": "BF16", "shape": [8_030_261_248]}})
    return tmp_path


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Free bytes of each of a machine's GPUs; empty for none."""
    gpus: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (gpus[gpu], 80 * GIB))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(memory_check, "free_host_memory", lambda: 24 * GIB)
    return gpus


def refusal(policy: Path, models: ModelConfig, devices: DevicesConfig | None = None, **changed: Any) -> str | None:
    try:
        check_training_memory(
            TrainConfig(**changed), models, devices or DevicesConfig(), policy, prompt=500, response=300
        )
    except OutOfMemoryError as error:
        return str(error)
    return None


def test_8b_does_not_train_on_one_gpu_of_80_gb(llama3_8b: Path, free: list[int]) -> None:
    free += [79 * GIB]
    said = refusal(llama3_8b, GPU)
    assert said is not None
    assert said.startswith("train needs 14")  # GiB
    assert "of GPU memory, and 79.00 GiB are free (8.03 billion parameters" in said
    assert "set train.lora.r=16" in said
    assert "train.strategy=fsdp2" in said
    assert refusal(llama3_8b, GPU, lora=LoraConfig()) is None


def test_what_it_says_helps(llama3_8b: Path, free: list[int]) -> None:
    free += [79 * GIB]
    said = refusal(llama3_8b, GPU) or ""
    count = int(said.partition("train.gradient_checkpointing=true on ")[2].split()[0])
    free += [79 * GIB] * (count - 1)
    assert refusal(llama3_8b, GPU, gradient_checkpointing=True, batch_size=4 * count) is None
    # Without sharding it fits on no number of them.
    assert refusal(llama3_8b, GPU, gradient_checkpointing=True, batch_size=4 * count, strategy="ddp") is not None


def test_the_fullest_gpu_in_use_decides(llama3_8b: Path, free: list[int]) -> None:
    free += [79 * GIB, 5 * GIB, 60 * GIB]
    lora = {"lora": LoraConfig(), "processes": 1}
    assert refusal(llama3_8b, GPU, **lora) is None
    assert "5.00 GiB are free" in (refusal(llama3_8b, GPU, DevicesConfig(gpus=[1]), **lora) or "")
    both = {"lora": LoraConfig(), "packed_tokens": 1024}
    assert "5.00 GiB are free" in (refusal(llama3_8b, GPU, DevicesConfig(gpus=[0, 1]), **both) or "")
    assert refusal(llama3_8b, GPU, DevicesConfig(gpus=[0, 2]), **both) is None


def test_on_the_cpu_the_hosts_memory_decides(llama3_8b: Path, free: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    said = refusal(llama3_8b, CPU) or ""
    assert "of memory, and 24.00 GiB are free" in said
    assert "fsdp2" not in said
    monkeypatch.setattr(memory_check, "free_host_memory", lambda: 200 * GIB)
    assert refusal(llama3_8b, CPU) is None
    assert "400" not in (refusal(llama3_8b, CPU, processes=2) or "")
    assert refusal(llama3_8b, CPU, processes=2) is not None


def test_what_is_not_known_is_not_refused(llama3_8b: Path, free: list[int], tmp_path: Path) -> None:
    free += [GIB]
    file = tmp_path / "accelerate.yaml"
    file.write_text("num_processes: 1")  # it may shard, or move states to the host
    assert refusal(llama3_8b, GPU, accelerate_config=str(file)) is None
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    write_weights(adapter / "adapter_model.safetensors", {"weights": {"dtype": "F32", "shape": [10**9]}})
    assert refusal(adapter, GPU) is None
