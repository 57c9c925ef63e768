"""Finds where the host would wait for a device, without one: on torch's `meta` device, whose tensors hold no values.

Reading a value on the host raises an error there, as does an operation whose result's shape depends on values.
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
