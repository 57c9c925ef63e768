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
    network: float = 0.0
    """Bytes between a node and the others, on a cluster."""
    filesystem: float = 0.0
    """Bytes that all nodes read from the shared file system and write to it."""
    busy: float | None = None
    """GPU seconds of work; None: `devices` are busy for `work`."""

    def entry(self, seconds: float, wait: float, before: float, *, cuda: bool, all_gpus: int | None) -> dict[str, Any]:
        """The stage's entry in a plan.

        Args:
            seconds: of the stage, with the wait for its process.
            wait: for its process.
            before: seconds that precede it and count as its start-up.
            all_gpus: of a cluster, which are reserved all along; None: this machine alone.
        """
        entry = {
            "seconds": seconds + before,
            "startup_seconds": wait + self.load + before,
            "work_seconds": seconds - wait - self.load,
            "gpu_hours": self.devices * (seconds + before) / 3600 if cuda else 0.0,
            "tokens": int(self.tokens),
            "disk_bytes": round(self.disk),
            "transient_disk_bytes": round(self.transient),
            "peak_memory_bytes": self.memory,
            **self.counts,
            **({} if self.least_memory is None else {"least_memory_bytes": self.least_memory}),
            **({"remedy": self.remedy} if self.remedy else {}),
            **({"lacking": self.lacking} if self.lacking else {}),
        }
        if all_gpus is not None:
            busy = self.devices * self.work if self.busy is None else self.busy
            entry |= {
                "idle_gpu_hours": max(0.0, all_gpus * (seconds + before) - busy) / 3600,
                "network_bytes": round(self.network),
                "filesystem_bytes": round(self.filesystem),
            }
        return entry
