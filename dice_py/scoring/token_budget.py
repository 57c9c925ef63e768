"""How many tokens one batch may have: found while the work goes on, and remembered per model and device.

On a GPU it starts at what the model's shape lets expect, and grows until memory is near full; what a batch takes
grows with its tokens, so the last batch says how far. Out of memory halves it. On a CPU more tokens stop paying
early (benches/scoring.py measures it), so it only has to fit.
"""

from __future__ import annotations

from typing import Literal

import torch

from dice_py.compute.memory import free_memory
from dice_py.events import Report
from dice_py.models.flops import Shape, device_name
from dice_py.storage.cache import recall, remember

_CPU_TOKENS = 8192
_GPU_TOKENS = 131072  # a batch of seconds already; larger ones only make an out-of-memory error cost more
_NEAR_FULL = 0.9
_KIND = "token budgets"


class TokenBudget:
    """Tokens of one batch, now: `tokens`.

    Args:
        given: a number that is kept to (and only halved where memory runs out), or "auto".
        shape, dtype, device: of the model that is held there already.
    """

    least = 256
    """A batch of no more tokens is not halved: the error is then the caller's."""

    def __init__(
        self, given: int | Literal["auto"], shape: Shape, dtype: torch.dtype, device: torch.device, report: Report
    ) -> None:
        self._auto = given == "auto"
        self._device = device
        self._report = report
        self._key = f"{shape.name}, {dtype}, {device_name(device)}"
        self._cap = _GPU_TOKENS if device.type == "cuda" else _CPU_TOKENS
        if given == "auto":
            # In a layer: the residual, its norm, queries, keys, values and what attention gives, and the two sides of
            # the feed-forward with their product. A guess that only has to be near; the largest batch corrects it.
            each = dtype.itemsize * (8 * shape.hidden + 4 * shape.widest)
            fitting = int(_NEAR_FULL / 2 * free_memory(device) / each)
            known = recall(_KIND, self._key)
            self.tokens = max(self.least, min(known if isinstance(known, int) else fitting, fitting, self._cap))
        else:
            self.tokens = given

    def start(self) -> None:
        """Before a batch: from here on its memory is counted."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)

    def fitted(self, tokens: int) -> None:
        """After a batch of so many tokens that went well: grows where there is room."""
        if not self._auto or self._device.type != "cuda":
            return
        taken = torch.cuda.max_memory_allocated(self._device) - self._before
        self.grow(tokens, taken, free_memory(self._device))

    def grow(self, tokens: int, taken: int, room: int) -> None:
        """A batch of `tokens` took `taken` bytes of the `room` that there was; at most twice as many come next."""
        if tokens < self.tokens // 2:
            return  # too small a batch to tell
        grown = min(2 * self.tokens, int(_NEAR_FULL * room * tokens / max(taken, 1)), self._cap)
        if grown > self.tokens:
            self.tokens = grown
            remember(_KIND, self._key, grown)

    def halve(self, tokens: int) -> None:
        """A batch of so many tokens did not fit."""
        self.tokens = self._cap = max(self.least, tokens // 2)
        if self._auto:
            remember(_KIND, self._key, self.tokens)
        self._report("note", text=f"out of memory with {tokens} tokens in a batch; going on with {self.tokens}")
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
