"""Whether this process was asked to stop its work at the next good place: a training, at the end of a step.

A run's process asks its worker over their pipe (compute/worker.py), and a training's stage its ranks
(training/launcher.py). Work that has no such place does not look.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

_asked = threading.Event()


@dataclass(frozen=True)
class StopRequest:
    """The message that asks a process."""


def ask_to_stop() -> None:
    """Asks the work of this process."""
    _asked.set()


def is_asked_to_stop() -> bool:
    """Whether the work of this process was asked."""
    return _asked.is_set()
