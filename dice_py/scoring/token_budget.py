"""The largest number of tokens in one batch, adapted to the device while batches run and cached per model and device.

On a GPU the budget starts at an estimate from the model's shape and grows until memory is nearly full. The memory of a
batch is proportional to its tokens, so the last batch shows how far it can grow. An out-of-memory error halves it. On a
CPU larger batches soon stop being faster (benches/scoring.py measures it), so the budget only has to fit in memory.
"""

from __future__ import annotations

from typing import Literal

import torch

from dice_py.compute.memory import free_memory, peak_since_start, start_peak
from dice_py.events import Report
from dice_py.models.flops import Shape, device_name
from dice_py.storage.cache import recall, remember

_CPU_TOKENS = 8192
_GPU_TOKENS = 131072  # a batch of seconds already; larger ones only make an out-of-memory error cost more
_USABLE = 0.9  # share of the free memory that a batch may use
_CACHE_KIND = "token budgets"


class TokenBudget:
    """Tokens allowed in one batch: `tokens`.

    Args:
        setting: a fixed number, lowered only when memory runs out; or "auto".
        shape, dtype, device: of the model, already loaded on `device`.
        report: receives a note when the budget is halved.
    """

    minimum = 256
    """Tokens; a batch of no more is not halved, and its error reaches the caller."""

    def __init__(
        self, setting: int | Literal["auto"], shape: Shape, dtype: torch.dtype, device: torch.device, report: Report
    ) -> None:
        self._auto = setting == "auto"
        self._device = device
        self._report = report
        self.cache_key = f"{shape.name}, {dtype}, {device_name(device)}"
        self._cap = _GPU_TOKENS if device.type == "cuda" else _CPU_TOKENS
        if setting == "auto":
            # Per token in a layer: the residual, its norm, queries, keys, values and attention's output, and both
            # sides of the feed-forward with their product. A rough estimate; `grow` corrects it.
            token_bytes = dtype.itemsize * (8 * shape.hidden + 4 * shape.widest)
            fitting = int(_USABLE / 2 * free_memory(device) / token_bytes)
            cached = recall(_CACHE_KIND, self.cache_key)
            self.tokens = max(self.minimum, min(cached if isinstance(cached, int) else fitting, fitting, self._cap))
        else:
            self.tokens = setting

    def start(self) -> None:
        """Call before a batch: its peak memory is measured from here."""
        if self._device.type == "cuda":
            self._before = start_peak(self._device)

    def record_success(self, tokens: int) -> None:
        """Call after a batch of `tokens` that fit in memory: the budget grows where there is room."""
        if not self._auto or self._device.type != "cuda":
            return
        used = peak_since_start(self._device) - self._before
        self.grow(tokens, used, free_memory(self._device))

    def grow(self, tokens: int, used: int, free: int) -> None:
        """Raises the budget, to at most double. A batch of `tokens` used `used` bytes, and `free` bytes are free."""
        if tokens < self.tokens // 2:
            return  # fixed costs dominate a small batch
        grown = min(2 * self.tokens, int(_USABLE * free * tokens / max(used, 1)), self._cap)
        if grown > self.tokens:
            self.tokens = grown
            remember(_CACHE_KIND, self.cache_key, grown)

    def halve(self, tokens: int) -> None:
        """Lowers the budget to half of a batch of `tokens` that ran out of memory, for the rest of this process."""
        self.tokens = self._cap = max(self.minimum, tokens // 2)
        if self._auto:
            remember(_CACHE_KIND, self.cache_key, self.tokens)
        self._report("note", text=f"out of memory with {tokens} tokens in a batch; continuing with {self.tokens}")
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
