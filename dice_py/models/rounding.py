"""How far weights moved, and how much of that is left when they are rounded to another dtype.

At DPO's learning rates an update is small: of a start in bfloat16, which has 8 bits, rounding to bfloat16 may give the
start again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

ENOUGH = 0.5
"""Weights that would keep less than this of their change are stored in float32, where nobody asked for another."""


class Change(NamedTuple):
    """A change Δ = after − before of all weights, and Δ' = after, rounded − before.

    Attributes:
        rms: root mean square of Δ over the weights.
        largest: largest |Δ|.
        kept: Δ'·Δ / Δ·Δ, the share of the change that is left after rounding; 1 if nothing changed.
    """

    rms: float
    largest: float
    kept: float


class ChangeSum:
    """Adds up a change over parts of the weights."""

    def __init__(self) -> None:
        self._squares = self._kept = self._largest = 0.0
        self._count = 0

    def add(self, before: torch.Tensor, after: torch.Tensor, dtype: torch.dtype) -> None:
        """Adds a part, which is rounded to `dtype`. Tensors that are not floating-point numbers are left out."""
        import torch

        if not after.is_floating_point():
            return
        before = before.to(device=after.device, dtype=torch.float32)
        change = after.detach().float() - before
        self._squares += float(change.square().sum(dtype=torch.float64))
        rounded = after.detach().to(dtype).float() - before
        self._kept += float((rounded * change).sum(dtype=torch.float64))
        self._largest = max(self._largest, float(change.abs().max())) if change.numel() else self._largest
        self._count += change.numel()

    def total(self) -> Change:
        """The change of all parts."""
        kept = self._kept / self._squares if self._squares else 1.0
        return Change(math.sqrt(self._squares / max(1, self._count)), self._largest, kept)


def measure_change(weights: Iterable[tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype) -> Change:
    """The change of weights, and what rounding to `dtype` leaves of it.

    Args:
        weights: each tensor before, and after in the dtype that it was changed in. Those that are not floating-point
            numbers are left out.
    """
    total = ChangeSum()
    for before, after in weights:
        total.add(before, after, dtype)
    return total.total()
