"""Tiny models of many families: those that can be scored with packed attention, and those that cannot."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from tiny_sets import LAST
from transformers import PreTrainedModel

SHAPE: dict[str, Any] = {
    "vocab_size": LAST + 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = 8  # far smaller than the sequences
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {  # the head size of values differs from that of queries and keys
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 2,
    "first_k_dense_replace": 2,
}

PACKED: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": WINDOW},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 16},
    "Gemma2": {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 16, "final_logit_softcapping": 2.0},
    "Mixtral": MIXTURE,
    "Phi": {},  # a bias in the head
    "Phi3": {},
    "Granite": {"logits_scaling": 4.0},
    "Cohere": {"logit_scale": 0.25},
    "GPT2": {},
    "Olmo": {},
    "DeepseekV3": LATENT,
}
NOT_PACKED: dict[str, dict[str, Any]] = {
    "Bloom": {"n_head": 2, "n_layer": 2},
    "Lfm2": {"full_attn_idxs": [1], "block_ff_dim": 48},  # its convolutions ignore where a sequence ends
    "Llama4": {"head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": WINDOW},
}


@cache
def build(name: str) -> PreTrainedModel:
    """A tiny model of a family, with random weights."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}{'Text' if name == 'Llama4' else ''}Config")
    kind = getattr(transformers, f"{name}{'LMHeadModel' if name == 'GPT2' else 'ForCausalLM'}")
    model = kind(config(**{**SHAPE, **{**PACKED, **NOT_PACKED}[name]})).eval()
    if model.get_output_embeddings().bias is not None:
        torch.nn.init.uniform_(model.get_output_embeddings().bias, -2.0, 2.0)
    return model
