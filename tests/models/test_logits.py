"""What a model's config says of its logits, as its forward applies it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tiny_families import SHAPE

from dice_py.models.logits import logit_transform

FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "final_logit_softcapping": 2.0},
    "Granite": {"logits_scaling": 4.0},
    "Cohere": {"logit_scale": 0.25},
    "RecurrentGemma": {"logits_soft_cap": 2.0, "lru_width": 32, "block_types": ["recurrent", "attention"]},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_factor_and_cap_are_those_of_the_models_forward(name: str) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **FAMILIES[name]})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    ids = torch.arange(5)[None] + 10
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        plain = model.get_output_embeddings()(hidden)
        want = model(input_ids=ids, use_cache=False).logits
    scale, cap = logit_transform(config)
    scaled = plain * scale
    torch.testing.assert_close(scaled if cap is None else cap * torch.tanh(scaled / cap), want)
    assert name == "Llama" or not torch.allclose(plain, want)
