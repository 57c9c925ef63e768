"""Finds where the host would wait for a device, without one; and the largest tensor that is made.

On torch's `meta` device, whose tensors hold no values, reading a value on the host raises an error, as does an
operation whose result's shape depends on values. `Traffic` lists the copies that are left. Where values are needed,
`HostReads` counts the reads on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero"}


class Traffic(TorchDispatchMode):
    """Collects the copies from the host in `copies`, by the name of the operation; `blocking` ones wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []
        self.blocking: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        devices = {one.device for one in (*args, result) if isinstance(one, torch.Tensor)}
        # A tensor made from a list is made on the host, and then copied.
        if len(devices) > 1 or func is torch.ops.aten.lift_fresh.default:
            self.copies.append(func.name())
        if len(devices) > 1 and not (kwargs or {}).get("non_blocking"):
            self.blocking.append(func.name())
        return result


class HostReads(TorchDispatchMode):
    """Collects, in `reads`, the operations that bring values to the host: of `item()`, or for a result's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        selects = func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if func.name() in _READS or selects:
            self.reads.append(func.name())
        return func(*args, **(kwargs or {}))


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
