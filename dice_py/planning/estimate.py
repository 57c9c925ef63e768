"""The estimate of one stage of a plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Estimate:
    """A stage's estimate, without the wait for its process."""

    work: float = 0.0
    """Seconds, without `load`."""
    load: float = 0.0
    """Seconds for weights."""
    tokens: float = 0.0
    disk: float = 0.0
    """Bytes that stay."""
    transient: float = 0.0
    """Further bytes on the disk while the stage works."""
    memory: int = 0
    """Peak bytes of one GPU, or of the host."""
    least_memory: int | None = None
    """Bytes that it can do with; None: its peak."""
    remedy: Callable[[int], str] | None = None
    """What to set if fewer bytes than these are free; None: the stage's remedy (stages/registry.py)."""
    has_process: bool = True
    """Whether it has a process of its own, which is started ahead."""
    devices: int = 0
    """GPUs in use."""
    counts: dict[str, Any] = field(default_factory=dict)
    lacking: dict[str, Any] | None = None
    """A shortage of something other than memory and disk (planning/feasibility.py)."""
