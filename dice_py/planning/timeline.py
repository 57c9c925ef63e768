"""When stages wait for their processes. The process of the next stage is started while a stage works."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A stage on the timeline."""

    startup: float | None
    """Seconds from the start of its process until that has imported what it needs; None: it needs no process."""
    work: float
    """Seconds after that."""
    prepares: bool = False
    """Whether the process of the next task that needs one is started when this task starts."""


def shared_speed(cores: int) -> float:
    """At which a task on all cores and an import on one of them go on together, as a share of their speed alone."""
    return cores / (cores + 1)


def timeline(tasks: Sequence[Task], speed: float = 1.0) -> list[tuple[float, float]]:
    """(seconds, of these waiting for its process) of each task; tasks run one after the other.

    A process that was started ahead (runs/folder.py) imports while the tasks before its own run, so that its task waits
    only for the rest of the import.

    Args:
        speed: of a task's work and of an import while both go on. 1: they do not slow each other down, or the tasks'
            seconds have that in them.
    """
    times = []
    importing: float | None = None  # seconds that the process started ahead still imports; None: none was started
    for at, task in enumerate(tasks):
        wait = 0.0
        if task.startup is not None:
            wait = task.startup if importing is None else importing
            following = next((later.startup for later in tasks[at + 1 :] if later.startup is not None), None)
            importing = following if task.prepares else None
        seconds = wait + task.work
        if importing is not None:
            importing = max(0.0, importing - wait)
            together = min(importing, task.work)
            seconds += together * (1.0 / speed - 1.0)
            importing -= together
        times.append((seconds, wait))
    return times
