"""Memory of the host and of a GPU: what is free, and what this process has used at most."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on a device, this process's cached ones included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return free_host_memory()


def free_host_memory() -> int:
    """Bytes of the host, or of this control group where that is less."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limit, used = (_lines(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit and used and limit[0].isdigit():
        # What the files' cache holds can be given back, so counting it as used errs on the safe side.
        available = min(available, max(int(limit[0]) - int(used[0]), 0))
    return available


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


def peak_memory() -> int:
    """Bytes at the most, so far: of the GPU where one was used, else of this process."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    return resident_memory("VmHWM")


def resident_memory(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)
