"""A run as it goes on, for `dice status --watch`: its files are read again and again, and nothing is changed.

Imports no torch. The run may be another process's, of another user's, or finished.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dice_py.runs.event_log import Event, EventTail
from dice_py.runs.progress import Progress, read_progress
from dice_py.runs.round_models import TRAINING_STAGES
from dice_py.runs.status import run_status
from dice_py.training.log import Entry, read_training_log

_WARNINGS = 3
_WARNING = "warning: "
"""How the note of a warning begins that is not of runs/warnings.py."""


@dataclass(frozen=True)
class Live:
    """The state of a run at a moment."""

    status: dict[str, Any]
    """As `run_status` has it."""
    progress: Progress | None
    """Of the running stage, if it has reported any."""
    training: str | None
    """The stage whose log `log` is: the last training that has one, such as "round-01/train"."""
    log: list[Entry]
    warnings: list[str]
    """The last few, oldest first."""
    gpus: list[dict[str, Any]]
    """The last figures of the GPUs (compute/gpu_monitor.py)."""


class Watch:
    """Looks at a run folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._events = EventTail(folder / "events.jsonl")
        self._warnings: deque[str] = deque(maxlen=_WARNINGS)
        self._gpus: list[dict[str, Any]] = []

    def look(self) -> Live:
        """The state now.

        Raises:
            UsageError, DataError: as of `run_status`.
        """
        status = run_status(self._folder)
        for event in self._events.new():
            self._take(event)
        training, log = self._log(status)
        return Live(status, self._progress(status), training, log, list(self._warnings), self._gpus)

    def _progress(self, status: dict[str, Any]) -> Progress | None:
        """Of the running stage; before the first one, of what is made for it (the synthetic world, say)."""
        if status["state"] != "running":
            return None
        entries = status["entries"]
        running = next((entry["stage"] for entry in entries if entry["status"] == "running"), None)
        begun = any(entry["status"] != "to do" for entry in entries)
        return None if running is None and begun else read_progress(self._folder, running or "")

    def _take(self, event: Event) -> None:
        text = event.get("text")
        if event["event"] == "started":
            self._warnings.clear()  # those of an earlier process, which what still holds comes again
        elif event["event"] == "gpu" and event.get("gpus"):
            self._gpus = event["gpus"]
        elif event["event"] == "warning" and isinstance(text, str):
            place = f"round {event['round']}, {event['stage']}: " if {"round", "stage"} <= event.keys() else ""
            self._warnings.append(f"{place}{text}")
        elif event["event"] == "note" and isinstance(text, str) and text.startswith(_WARNING):
            self._warnings.append(text.removeprefix(_WARNING))

    def _log(self, status: dict[str, Any]) -> tuple[str | None, list[Entry]]:
        """The log of the last training that has begun."""
        begun = [entry for entry in status["entries"] if entry["status"] != "to do"]
        for entry in reversed([each for each in begun if each["stage"].partition("/")[2] in TRAINING_STAGES]):
            key = entry["key"]
            log = read_training_log(self._folder / entry["stage"], key if entry["status"] != "done" else None)
            if log:
                return entry["stage"], log
        return None, []
