"""TRL's loss with the terms of each pair: w · [p · L(y_w, y_l) + (1 − p) · L(y_l, y_w)], on shifted references.

The model runs once. For the second loss the halves of its output, of the mask and of the references change places. The
sft term is the chosen response's in both, so that it is left out of the second. All else is TRL's code
(training/loss.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from dice_py.storage.schemas import START_LOGPS
from dice_py.training.loss import loss_of_trl
from dice_py.training.pair_terms import PAIR_TERMS

_OURS = (*START_LOGPS, *PAIR_TERMS)
_REFERENCES = ("ref_chosen_logps", "ref_rejected_logps")


class LossTrainer(Protocol):
    """What the loss reads and sets of a trainer."""

    loss_types: list[str]
    loss_weights: list[float]
    ld_alpha: float | None
    aux_loss_enabled: bool
    pair_weights: torch.Tensor | None
    sft_weights: torch.Tensor | None


def inputs_of_trl(trainer: LossTrainer, inputs: dict[str, Any]) -> dict[str, Any]:
    """`inputs` without what TRL does not know, with the references that its loss subtracts.

    With `ld_alpha` a reference is Σ over the shared length + α·(Σ over the rest), as TRL computes the policy's.
    """
    known = {name: value for name, value in inputs.items() if name not in _OURS}
    for side in ("chosen", "rejected"):
        name = f"ref_{side}_logps"
        if trainer.ld_alpha is not None:
            shared = inputs[f"ref_{side}_shared_logps"]
            known[name] = shared + trainer.ld_alpha * (known[name] - shared)
        if f"{side}_shift" in inputs:
            known[name] = known[name] + inputs[f"{side}_shift"]
    return known


def pair_loss(trainer: LossTrainer, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """The loss of a batch, a mean over its pairs, and TRL's parts of it (`LOSS_PARTS`) with the true references.

    Args:
        trainer: whose `loss_types`, `loss_weights` and `ld_alpha` are used.
        model: called once, as TRL calls it.
        inputs: of `PairTrainer.inputs_of`.
    """
    known = inputs_of_trl(trainer, inputs)
    label, weight = inputs.get("label"), inputs.get("weight")
    if label is None:
        with _weighted(trainer, weight, weight):
            loss, parts = loss_of_trl()(trainer, model, known, False)
    else:
        once = _Once(model)
        with _weighted(trainer, label if weight is None else label * weight, weight):
            loss, parts = loss_of_trl()(trainer, once, known, False)
        with _weighted(trainer, 1 - label if weight is None else (1 - label) * weight, None), _without_extras(trainer):
            reversed_loss, _ = loss_of_trl()(trainer, lambda **_: once.exchanged(), _exchanged(known), False)
        loss = loss + reversed_loss
    for side in ("chosen", "rejected"):
        if f"{side}_shift" in inputs:
            parts[f"{side}_logratios"] = parts[f"{side}_logratios"] + inputs[f"{side}_shift"]
    return loss, parts


class _Once:
    """A model whose output is kept."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.output: Any = None

    def __call__(self, **inputs: Any) -> Any:
        self.output = self.model(**inputs)
        return self.output

    def exchanged(self) -> Any:
        """The output with rejected before chosen: of what a loss reads."""
        squares = getattr(self.output, "log_sum_sq_probs", None)
        return Outputs(_swap(self.output.log_probs), None if squares is None else _swap(squares))


@dataclasses.dataclass
class Outputs:
    """What a loss reads of a model's output: (2 × pairs, tokens) each."""

    log_probs: torch.Tensor
    log_sum_sq_probs: torch.Tensor | None = None


def _swap(halves: torch.Tensor) -> torch.Tensor:
    first, second = halves.chunk(2)
    return torch.cat([second, first])


def _exchanged(inputs: dict[str, Any]) -> dict[str, Any]:
    """TRL's inputs with chosen and rejected exchanged. A packed row's model is not called again."""
    tensors = {name: _swap(value) for name, value in inputs.items() if name not in (*_REFERENCES, "packed")}
    return tensors | {one: inputs[other] for one, other in zip(_REFERENCES, reversed(_REFERENCES), strict=True)}


@contextlib.contextmanager
def _weighted(trainer: LossTrainer, pairs: torch.Tensor | None, sft: torch.Tensor | None) -> Iterator[None]:
    """Within the block, TRL's loss weighs the pairs, (pairs,) each: of the sft loss, and of all other types."""
    trainer.pair_weights, trainer.sft_weights = pairs, sft
    try:
        yield
    finally:
        trainer.pair_weights = trainer.sft_weights = None


@contextlib.contextmanager
def _without_extras(trainer: LossTrainer) -> Iterator[None]:
    """Within the block, the loss has neither an sft term nor one that balances experts."""
    weights, balances = trainer.loss_weights, trainer.aux_loss_enabled
    trainer.loss_weights = [
        0.0 if name == "sft" else weight for name, weight in zip(trainer.loss_types, weights, strict=True)
    ]
    trainer.aux_loss_enabled = False
    try:
        yield
    finally:
        trainer.loss_weights, trainer.aux_loss_enabled = weights, balances
