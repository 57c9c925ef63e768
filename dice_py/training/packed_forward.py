"""The forward of a packed row under TRL's losses: log-probabilities as TRL's own forward returns them.

`add_packed_forward` takes the place of TRL's `add_fused_lm_head`. A forward with `packed=` runs on one packed row, and
scatters the log-probabilities of the responses' tokens to where TRL expects them. Any other forward is TRL's.

The head runs on the positions that predict a response's token only. On a CPU its logits are kept for the backward
pass, which then needs two matrix products instead of three. Where they would be large, and on a GPU, TRL's tiles
compute them again.
"""

from __future__ import annotations

import functools
import types
from typing import TYPE_CHECKING, Any

import torch
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from dice_py.models.logits import logit_transform
from dice_py.training.lean_layers import add_gradient, adds_in_place
from dice_py.training.packed_rows import PackedRow

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_KEPT_LOGITS = 2**26  # entries: 256 MiB in float32
_TILE = 32768  # TRL's width of a tile, in entries of the vocabulary
_NEEDED = ("log_probs", "log_sum_sq_probs")
"""The outputs of TRL's head that a loss reads. The others feed metrics alone."""


class KeptLogits(torch.autograd.Function):  # type: ignore[misc]
    """log softmax(hidden · weightᵀ + bias) at the targets, with the logits kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        in_place: bool,
    ) -> torch.Tensor:
        """(positions, hidden), (vocabulary, hidden), (vocabulary,), (positions,) int64 → (positions,) float32.

        `in_place`: the weight's gradient is added as lean layers do (training/lean_layers.py).
        """
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        with torch.autocast(device, enabled=False):
            logits = torch.nn.functional.linear(
                hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
            ).float()
        normalizer = logits.logsumexp(dim=-1)
        logps = logits.gather(1, targets[:, None])[:, 0] - normalizer
        ctx.save_for_backward(hidden, weight, targets, logits, normalizer)
        ctx.dtype, ctx.has_bias, ctx.in_place = dtype, bias is not None, in_place
        return logps

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """d log p(target) / d logits = onehot(target) − softmax(logits)."""
        hidden, weight, targets, logits, normalizer = ctx.saved_tensors
        # In place: the logits are needed no more.
        gradient = logits.sub_(normalizer[:, None]).exp_().mul_(-grad[:, None])
        gradient.scatter_add_(1, targets[:, None], grad[:, None])
        gradient = gradient.to(ctx.dtype)
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        of_weight = None
        if needs_weight:
            states = hidden.to(ctx.dtype)
            of_weight = add_gradient(weight, gradient, states) if ctx.in_place else gradient.T @ states
        return (
            (gradient @ weight.to(ctx.dtype)).to(hidden.dtype) if needs_hidden else None,
            None if of_weight is None else of_weight.to(weight.dtype),
            gradient.sum(dim=0, dtype=torch.float32).to(weight.dtype) if ctx.has_bias and needs_bias else None,
            None,
            None,
        )


def response_logps(
    model: PreTrainedModel, hidden: torch.Tensor, targets: torch.Tensor, outputs: tuple[str, ...]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities of tokens, and log Σ_v p_v² where `outputs` asks for it.

    Args:
        hidden: (positions, hidden size), the states that predict `targets`.
        outputs: of TRL's head, from `log_probs` and `log_sum_sq_probs`.

    Returns:
        (positions,) float32 in nats; (positions,) float32 or None.
    """
    head = model.get_output_embeddings()
    weight, bias = head.weight, head.bias
    if hasattr(weight, "full_tensor"):  # FSDP2's shards
        weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
    scale, cap = logit_transform(model.config)
    small = hidden.device.type == "cpu" and len(targets) * len(weight) <= _KEPT_LOGITS
    if small and scale == 1.0 and cap is None and outputs == ("log_probs",):
        logps: torch.Tensor = KeptLogits.apply(hidden, weight, bias, targets, adds_in_place(head))
        return logps, None
    logps, _, squares, _, _ = ChunkedLogProbFunction.apply(
        hidden, weight, bias, targets, 1.0, _TILE, cap, scale, outputs
    )
    return logps, squares


def packed_output(model: PreTrainedModel, row: PackedRow, outputs: tuple[str, ...] = ("log_probs",)) -> Any:
    """TRL's output of a forward on one packed row; the packed attention must be in use (models/packed_attention.py)."""
    # Where a model's prefix names none of its attributes (Llama4), `base_model` is the model itself.
    backbone = model.base_model if model.base_model is not model else model.model
    states = backbone(input_ids=row.tokens[None], position_ids=row.positions[None], use_cache=False).last_hidden_state[
        0
    ]
    found = response_logps(model, states[row.predicting], row.targets, outputs)

    def scattered(values: torch.Tensor) -> torch.Tensor:
        empty = torch.zeros((2 * row.pairs, row.width), dtype=torch.float32, device=values.device)
        return empty.index_put((row.sequences, row.columns), values)

    logps, squares = found
    return FusedCausalLMOutput(
        log_probs=scattered(logps), log_sum_sq_probs=None if squares is None else scattered(squares)
    )


def add_packed_forward(model: PreTrainedModel, outputs: tuple[str, ...] = ("log_probs",)) -> None:
    """TRL's `add_fused_lm_head`, and `model(packed=row, …)` for packed rows.

    Args:
        outputs: what TRL asks of its head; what no loss reads is left out.
    """
    needed = tuple(name for name in outputs if name in _NEEDED)
    if model.base_model is model:  # TRL's forward reads `base_model`, on padded rows
        model.base_model_prefix = "model"
    add_fused_lm_head(model, outputs=needed)
    forward_of_trl = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, packed: PackedRow | None = None, **kwargs: Any) -> Any:
        if packed is None:
            return forward_of_trl(*args, **kwargs)
        return packed_output(self, packed, needed)

    model.forward = types.MethodType(forward, model)
