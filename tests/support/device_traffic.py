"""Records what torch does: where the host would wait for a device, and the largest tensor that it makes.

No device is needed for the first. torch's `meta` device has tensors without values: reading one on the host raises an
error there, as does an operation whose result's shape depends on values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Traffic(TorchDispatchMode):
    """Collects the copies from the host in `copies`, by the name of the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        devices = {one.device for one in (*args, result) if isinstance(one, torch.Tensor)}
        # A tensor made from a list is made on the host, and then copied.
        if len(devices) > 1 or func is torch.ops.aten.lift_fresh.default:
            self.copies.append(func.name())
        return result


class Largest(TorchDispatchMode):
    """Finds the entries of the largest tensor that is made, views not counted, in `entries`."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and isinstance(result, torch.Tensor):
            self.entries = max(self.entries, result.numel())
        return result
