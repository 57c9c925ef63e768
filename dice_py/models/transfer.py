"""Copies from the host to a device that the host does not wait for."""

from __future__ import annotations

import numpy as np
import torch


def to_device(part: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """`part` on `device`. The host goes on at once, and does not wait for the work that a GPU has to do before.

    The copy reads pinned memory, which torch keeps until it is done. A copy from other memory waits for the GPU.
    """
    tensor = torch.from_numpy(part) if isinstance(part, np.ndarray) else part
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
