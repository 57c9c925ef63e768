"""Free memory of the host and of a GPU, and the peak memory of this process. All in bytes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def free_memory(device: torch.device) -> int:
    """Free bytes of a device, with what this process's allocator holds in reserve."""
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return free_host_memory()


def free_host_memory() -> int:
    """Free bytes of the host, or of this control group where that is less."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limit, used, parts = (_lines(Path("/sys/fs/cgroup") / f"memory.{name}") for name in ("max", "current", "stat"))
    if limit and used and limit[0].isdigit():
        # Cached files count as used here, but the kernel frees them when memory is needed.
        cached = sum(int(line.split()[1]) for line in parts if line.startswith(("inactive_file ", "active_file ")))
        available = min(available, max(int(limit[0]) - max(int(used[0]) - cached, 0), 0))
    return available


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


_earlier_peaks: dict[int, int] = {}
"""The peaks of GPUs, by number, that torch forgot when the measurement of a part began."""


def start_peak(device: torch.device) -> int:
    """Begins to measure the peak of a part of the work on a GPU, as `peak_since_start` returns it.

    torch keeps one peak of each device and has to forget it for this. `peak_memory` still counts it.

    Returns:
        What is allocated now.
    """
    import torch

    index = torch.cuda.current_device() if device.index is None else device.index
    _earlier_peaks[index] = max(_earlier_peaks.get(index, 0), torch.cuda.max_memory_allocated(index))
    torch.cuda.reset_peak_memory_stats(index)
    return int(torch.cuda.memory_allocated(index))


def peak_since_start(device: torch.device) -> int:
    """The peak on a GPU since the last `start_peak`."""
    import torch

    return int(torch.cuda.max_memory_allocated(device))


def forget_peak(device: torch.device) -> None:
    """Begins to measure the peak that `peak_memory` returns, which is that of the process until then."""
    if device.type == "cuda":
        import torch

        _earlier_peaks.clear()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: sets VmHWM to what is resident now


def peak_memory() -> int:
    """The peak so far: of the GPU where one was used, else of this process's resident memory."""
    loaded = sys.modules.get("torch")
    if loaded is not None and loaded.cuda.is_available() and loaded.cuda.is_initialized():
        index = loaded.cuda.current_device()
        return max(_earlier_peaks.get(index, 0), int(loaded.cuda.max_memory_allocated(index)))
    return resident_memory("VmHWM")


def resident_memory(name: str) -> int:
    """A figure of /proc/self/status, such as "VmRSS" (now) or "VmHWM" (the peak); 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)
