"""Layers that keep less for the backward pass and add gradients in place, for training on a CPU.

In float32 on a CPU, the time of a row that is no matrix product goes into reading and writing memory. Three kinds of a
model's modules compute the same with less of it:

    RMS norms       keep their input alone, and not its normalized copy
    gated MLPs      keep the outputs of gate and up, and compute their product again (a product of elements, no matrix)
    linear layers   and embeddings add a row's gradient to the weight's in place, without a copy of the weight's size

A module is replaced where it is known by its parts, and where it returns the same as before on random input. Several
processes exchange gradients by hooks that in-place sums would pass by; a GPU has kernels of its own for all this.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENS = 4  # of the random input
_TOLERANCE = 1e-5  # of the largest output


def add_gradient(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor | None:
    """leftᵀ · right, the gradient of a weight: returned, or added to the gradient that the weight already has.

    Args:
        left: (tokens, outputs).
        right: (tokens, inputs).
    """
    if weight.grad is None:
        return left.t() @ right
    weight.grad.addmm_(left.t(), right)
    return None


class LeanLinear(torch.autograd.Function):  # type: ignore[misc]
    """hidden · weightᵀ + bias."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """(…, inputs), (outputs, inputs), (outputs,) → (…, outputs)."""
        ctx.save_for_backward(hidden if ctx.needs_input_grad[1] else None, weight)
        return torch.nn.functional.linear(hidden, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad
        flat = gradient.flatten(0, -2)
        return (
            gradient @ weight if needs_hidden else None,
            add_gradient(weight, flat, hidden.flatten(0, -2)) if needs_weight else None,
            flat.sum(dim=0) if needs_bias else None,
        )


class LeanEmbedding(torch.autograd.Function):  # type: ignore[misc]
    """The weight's rows of some tokens. As in torch, the padding token's row gets no gradient."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, weight: torch.Tensor, padding: int | None) -> torch.Tensor:
        """(…) int64, (vocabulary, hidden) → (…, hidden)."""
        ctx.save_for_backward(tokens, weight)
        ctx.padding = padding
        return torch.nn.functional.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor | None, None]:
        tokens, weight = ctx.saved_tensors
        if ctx.padding is not None:
            # It can be a token of the text too: many models pad with EOS.
            gradient = gradient.masked_fill((tokens == ctx.padding)[..., None], 0.0)
        into = torch.zeros_like(weight) if weight.grad is None else weight.grad
        into.index_add_(0, tokens.flatten(), gradient.flatten(0, -2))
        return None, into if weight.grad is None else None, None


class LeanNorm(torch.autograd.Function):  # type: ignore[misc]
    """x · weight / √(mean(x²) + ε), Zhang and Sennrich, arXiv 1910.07467, equation 4."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """(…, hidden), (hidden,) → (…, hidden)."""
        squares = torch.linalg.vecdot(hidden, hidden)
        scale = squares.div_(hidden.shape[-1]).add_(epsilon).rsqrt_()[..., None]
        ctx.save_for_backward(hidden, weight, scale)
        return (hidden * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, scale = ctx.saved_tensors
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (hidden * scale).mul_(gradient).flatten(0, -2).sum(dim=0)
        scaled = gradient * weight
        inner = torch.linalg.vecdot(scaled, hidden)[..., None].mul_(scale.pow(3)).div_(hidden.shape[-1])
        return scaled.mul_(scale).addcmul_(hidden, inner, value=-1.0), of_weight, None


class LeanGate(torch.autograd.Function):  # type: ignore[misc]
    """(silu(gate) ∘ up) · weightᵀ, the second half of a gated MLP (SwiGLU, Shazeer, arXiv 2002.05202)."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """(…, inner), (…, inner), (hidden, inner) → (…, hidden)."""
        ctx.save_for_backward(gate, up, weight)
        return torch.nn.functional.linear(torch.nn.functional.silu(gate).mul_(up), weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        of_weight = None
        if ctx.needs_input_grad[2]:
            of_weight = add_gradient(weight, gradient.flatten(0, -2), (silu * up).flatten(0, -2))
        inner = gradient @ weight
        # silu′ = σ + silu · (1 − σ)
        slope = torch.addcmul(sigmoid, silu, 1.0 - sigmoid)
        return slope.mul_(up).mul_(inner), silu.mul_(inner), of_weight


def use_lean_layers(model: PreTrainedModel) -> int:
    """Replaces the forwards of a float32 model's modules on a CPU; returns how many. Adapters are already added."""
    replaced = 0
    with torch.no_grad():
        for module in model.modules():
            found = _lean_forward(module)
            if found is None:
                continue
            forward, width = found
            if width is None or _same(module, forward, width):
                module.forward = forward
                replaced += 1
    return replaced


def adds_in_place(module: torch.nn.Module) -> bool:
    """Whether `use_lean_layers` replaced the forward of this linear layer."""
    return isinstance(vars(module).get("forward"), functools.partial)


def _lean_forward(module: torch.nn.Module) -> tuple[Callable[..., torch.Tensor], int | None] | None:
    """A forward that takes the place of the module's, and the width of its input; None: tokens."""
    if _is_plain(module):
        return functools.partial(_linear, module), module.in_features
    if type(module) is torch.nn.Embedding and not (module.max_norm or module.scale_grad_by_freq or module.sparse):
        return functools.partial(_embedding, module), None
    if type(module).__name__.endswith("RMSNorm"):
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if epsilon is not None and isinstance(getattr(module, "weight", None), torch.nn.Parameter):
            return functools.partial(_norm, module, epsilon), len(module.weight)
    down = getattr(module, "down_proj", None)
    if _is_plain(down) and down.bias is None and hasattr(module, "gate_proj") and hasattr(module, "up_proj"):
        return functools.partial(_gated, module), down.out_features
    return None


def _is_plain(module: Any) -> TypeGuard[torch.nn.Linear]:
    """Whether this is a linear layer, and nothing that inherits from one."""
    return type(module) is torch.nn.Linear


def _linear(module: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = LeanLinear.apply(hidden, module.weight, module.bias)
    return result


def _embedding(module: torch.nn.Embedding, tokens: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = LeanEmbedding.apply(tokens, module.weight, module.padding_idx)
    return result


def _norm(module: Any, epsilon: float, hidden: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = LeanNorm.apply(hidden, module.weight, epsilon)
    return result


def _gated(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = LeanGate.apply(module.gate_proj(hidden), module.up_proj(hidden), module.down_proj.weight)
    return result


def _same(module: torch.nn.Module, forward: Callable[..., torch.Tensor], width: int) -> bool:
    """Whether both forwards agree on random input. A module that takes other input than one tensor is left alone."""
    random = torch.Generator().manual_seed(0)
    hidden = 3.0 * torch.randn((1, _TOKENS, width), generator=random)
    try:
        expected, found = module(hidden), forward(hidden)
    except (TypeError, RuntimeError, AttributeError):
        return False
    if not isinstance(expected, torch.Tensor) or expected.shape != found.shape:
        return False
    return bool((found - expected).abs().max() <= _TOLERANCE * expected.abs().max())
