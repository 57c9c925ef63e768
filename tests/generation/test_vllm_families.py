"""The architectures that `generate.engine=auto` gives to vLLM on a CPU sample there as the scorer scores them.

test_engine_vllm.py has Llama and Mistral. One spawned process builds all engines, since vLLM leaves state in it.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import make_tokenizer, save_model
from vllm_config import PLAIN, changed_config

from dice_py.compute.stage_process import run_in_subprocess
from dice_py.config.shared import ModelConfig
from dice_py.config.stages import ScoreConfig
from dice_py.generation.engines.base import Request, sample_all
from dice_py.generation.engines.vllm import VllmEngine
from dice_py.generation.engines.vllm_on_cpu import ARCHITECTURES
from dice_py.models.loading import load_model
from dice_py.models.tokenization import load_tokenizer, stop_token_ids
from dice_py.scoring.scorer import Scorer
from dice_py.storage.keys import seed_for

FLOAT32 = ModelConfig(device="cpu", dtype="float32")
PROMPTS = [5, 40, 130]  # tokens; 128 are a block of vLLM's cache on a CPU
WINDOW = 16  # far smaller than the longest prompt
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen2ForCausalLM": {"tie_word_embeddings": True},
    "Qwen3ForCausalLM": {"head_dim": 32},
    "Phi3ForCausalLM": {},
    "Gemma3ForCausalLM": {"head_dim": 32, "sliding_window": WINDOW, "query_pre_attn_scalar": 32},
    "GraniteForCausalLM": {"logits_scaling": 4.0},
}
ELSEWHERE = {"LlamaForCausalLM", "MistralForCausalLM"}


def make_model(name: str, folder: Path) -> Path:
    """A tiny model of a family on disk."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer("chatml")
    kind = getattr(transformers, name)
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256, "initializer_range": 0.2,
        "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "tie_word_embeddings": False,
    }  # fmt: skip
    model = kind(kind.config_class(**shape | FAMILIES[name])).eval()
    return save_model(model, tokenizer, folder, [int(tokenizer.eos_token_id)], raise_by=1.5)


def differences(folders: dict[str, Path], report: Any) -> dict[str, float]:
    """In a process of its own, by architecture: the largest difference of a response's sum from the scorer's."""
    config = changed_config(PLAIN, vllm={"kv_cache_gib": 0.1, "max_num_seqs": 32})
    random = torch.Generator().manual_seed(0)
    prompts = [torch.randint(6, 262, (count,), generator=random).tolist() for count in PROMPTS]
    requests = [Request(prompts[number % len(prompts)], seed_for(1, number)) for number in range(48)]
    largest = {}
    for name, folder in folders.items():
        stops = stop_token_ids(folder, load_tokenizer(folder, FLOAT32))
        engine = VllmEngine(folder, config, FLOAT32, stops=stops, longest_prompt=max(PROMPTS))
        samples = sample_all(engine, requests)
        engine.close()
        scorer = Scorer(load_model(folder, FLOAT32), ScoreConfig())
        sums = scorer.sums([request.prompt_token_ids for request in requests], [s.token_ids for s in samples])
        largest[name] = max(abs(sample.logp - logp) for sample, logp in zip(samples, sums, strict=True))
    return largest


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="measured with vLLM's CPU build, and a GPU is here")
def test_families_that_auto_gives_to_vllm(tmp_path: Path) -> None:
    folders = {name: make_model(name, tmp_path / name) for name in FAMILIES}
    largest = run_in_subprocess(
        partial(differences, folders), log=tmp_path / "worker.log", remedy="", report=lambda event, **fields: None
    )
    print(largest)
    assert set(largest) | ELSEWHERE == ARCHITECTURES
    assert max(largest.values()) < 1e-4
