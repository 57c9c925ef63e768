"""Tiny models of architectures whose caches differ: sliding windows, learned positions, recurrent states."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_models import (
    MAX_POSITIONS,
    make_tokenizer,
    save_model,
)
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)


def make_other(folder: Path, build: Callable[[dict[str, Any]], PreTrainedModel]) -> Path:
    """A tiny model of another architecture, built from what a config needs to know of the tokenizer."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer("chatml")
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    model = build({"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in names}})
    return save_model(model, tokenizer, folder, [tokenizer.eos_token_id], raise_by=1.5)


_SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "initializer_range": 0.2,
}


def mistral(values: dict[str, Any]) -> PreTrainedModel:
    """Every layer slides over 8 tokens."""
    return MistralForCausalLM(MistralConfig(**values, **_SMALL, sliding_window=8, tie_word_embeddings=False))


def gemma2(values: dict[str, Any]) -> PreTrainedModel:
    """Every other layer slides over 16 tokens."""
    return Gemma2ForCausalLM(Gemma2Config(**values, **_SMALL, sliding_window=16))


def gpt2(values: dict[str, Any]) -> PreTrainedModel:
    """Positions are rows of an embedding: there is none behind the last."""
    return GPT2LMHeadModel(
        GPT2Config(**values, n_embd=64, n_layer=2, n_head=2, n_positions=MAX_POSITIONS, initializer_range=0.2)
    )


def mamba(values: dict[str, Any]) -> PreTrainedModel:
    """Recurrent states and no cache of keys and values."""
    return MambaForCausalLM(
        MambaConfig(**values, hidden_size=64, num_hidden_layers=2, state_size=8, initializer_range=0.2)
    )
