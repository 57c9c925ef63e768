"""Lean layers: the gradients of the model's own layers, with less kept for the backward pass."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from tiny_sets import FIRST, draw_ids
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dice_py.models.packed_attention import use_packed_attention
from dice_py.training.lean_layers import LeanGate, LeanLinear, LeanNorm, adds_in_place, use_lean_layers
from dice_py.training.packed_forward import packed_output
from dice_py.training.packed_rows import PackedRow, pack

SHAPE: dict[str, Any] = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
}  # fmt: skip
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "llama, tied": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "llama, padding in the text": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, pad_token_id=FIRST)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),  # biases
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),  # norms of queries and keys
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SHAPE)),  # 1 + weight, and GELU
}


def make(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = FAMILIES[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.train()


def row(seed: int) -> PackedRow:
    rng = random.Random(seed)
    sides = [([FIRST, *draw_ids(rng, 4)], [*draw_ids(rng, 9), FIRST], draw_ids(rng, 6)) for _ in range(2)]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return pack([dict(zip(names, side, strict=True)) for side in sides], torch.device("cpu"))


def backward(model: PreTrainedModel, packed: PackedRow) -> None:
    with use_packed_attention(model, packed.layout):
        packed_output(model, packed).log_probs.square().sum().backward()


def gradients(model: PreTrainedModel, rows: int = 3) -> dict[str, torch.Tensor]:
    """Those of several rows, added up."""
    for number in range(rows):
        backward(model, row(number))
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients(family: str, checkpointed: bool) -> None:
    plain = make(family)
    lean = copy.deepcopy(plain)
    assert use_lean_layers(lean) > 0
    if checkpointed:
        lean.gradient_checkpointing_enable({"use_reentrant": False})
    expected, found = gradients(plain), gradients(lean)
    assert expected.keys() == found.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=2e-6 * largest, msg=name)


def lean_modules(model: PreTrainedModel) -> set[str]:
    return {type(module).__name__ for module in model.modules() if adds_in_place(module)}


def test_what_is_replaced() -> None:
    models = {family: make(family) for family in FAMILIES}
    for model in models.values():
        use_lean_layers(model)
    assert lean_modules(models["llama"]) == {"Linear", "Embedding", "LlamaRMSNorm", "LlamaMLP"}
    assert lean_modules(models["qwen3"]) == {"Linear", "Embedding", "Qwen3RMSNorm", "Qwen3MLP"}
    # Gemma's norm and activation are others.
    assert "Linear" in lean_modules(models["gemma"])
    assert not lean_modules(models["gemma"]) & {"GemmaRMSNorm", "GemmaMLP"}


def test_frozen_weights_get_no_gradient() -> None:
    model = make("llama")
    use_lean_layers(model)
    down = model.model.layers[0].mlp.down_proj
    frozen = [down.weight, model.model.layers[0].input_layernorm.weight, model.model.layers[1].self_attn.q_proj.weight]
    for weight in frozen:
        weight.requires_grad_(False)
    expected = make("llama")
    for name, gradient in gradients(expected).items():
        parameter = dict(model.named_parameters())[name]
        if parameter.requires_grad:
            assert gradient.abs().max() > 0
    found = gradients(model)
    assert all(weight.grad is None for weight in frozen)
    assert len(found) == len(list(model.parameters())) - len(frozen)


def kept_bytes(model: PreTrainedModel) -> int:
    """Of tensors that autograd keeps, weights aside."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    packed = row(0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with use_packed_attention(model, packed.layout):
            packed_output(model, packed)
        return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)


def test_less_is_kept() -> None:
    plain, lean = make("llama"), make("llama")
    use_lean_layers(lean)
    tokens, layers = len(row(0).tokens), SHAPE["num_hidden_layers"]
    # The product of the MLP and silu(gate), and the normalized copies of two norms.
    less = 4 * tokens * layers * (2 * SHAPE["intermediate_size"] + 2 * SHAPE["hidden_size"])
    assert less <= kept_bytes(plain) - kept_bytes(lean) <= 1.2 * less


def test_a_rows_gradient_is_added_in_place() -> None:
    model = make("llama, tied")
    use_lean_layers(model)
    backward(model, row(0))
    before = {name: (parameter.grad.data_ptr(), parameter.grad.clone()) for name, parameter in model.named_parameters()}
    backward(model, row(1))
    for name, parameter in model.named_parameters():
        place, value = before[name]
        assert parameter.grad.data_ptr() == place
        assert not torch.equal(parameter.grad, value)


def test_derivatives() -> None:
    """Against differences of float64 values."""
    torch.manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(LeanLinear.apply, (draw(2, 3, 4), draw(5, 4), draw(5)))
    assert torch.autograd.gradcheck(LeanNorm.apply, (draw(2, 3, 4), draw(4), 1e-5))
    assert torch.autograd.gradcheck(LeanGate.apply, (draw(2, 3, 6), draw(2, 3, 6), draw(4, 6)))
