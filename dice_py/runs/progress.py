"""How far the running stage of a run is: count, rate and time left; and `progress.json`, by which others can see it.

The file is for the eye alone. It has no digest, it may lag by a second, and one that cannot be written is left out.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dice_py.runs.event_log import finite_number
from dice_py.storage.files import TEMPORARY

PROGRESS_FILE = "progress.json"

_EVERY = 1.0  # seconds between two writes


@dataclass(frozen=True)
class Progress:
    """The state of a stage, or of one step of it."""

    stage: str
    """Its name, with the step in parentheses: each step of a stage goes over the same rows."""
    done: int
    total: int
    unit: str
    per_second: float
    """0.0 until there is a rate."""

    @property
    def seconds_left(self) -> float | None:
        """None without a rate, and at the end."""
        return (self.total - self.done) / self.per_second if self.per_second and self.done < self.total else None

    def values(self) -> dict[str, Any]:
        """As a JSON object, with `seconds_left`."""
        return {**asdict(self), "seconds_left": self.seconds_left}


class Pace:
    """Makes the progress of a stage from its events."""

    def __init__(self) -> None:
        self._stage = ""
        self._first: int | None = None  # count of the stage's first event
        self._last = 0  # count of its last one
        self._began = 0.0

    def begin(self) -> None:
        """The next event is of another stage, whatever its name."""
        self._first = None

    def __call__(self, stage: str, done: int, total: int, unit: str = "rows", step: str | None = None) -> Progress:
        """The progress after an event of these fields."""
        now = time.monotonic()
        name = stage if step is None else f"{stage} ({step})"
        # A count that falls is of another pass over rows of the same kind: an evaluation samples two models.
        if name != self._stage or self._first is None or done < self._last:
            self._stage, self._first, self._began = name, done, now
        self._last = done
        # Shards that a resume kept count as done from the start, but not in the rate.
        speed = (done - self._first) / (now - self._began) if now > self._began else 0.0
        return Progress(name, done, total, unit, speed)


class ProgressFile:
    """Keeps `progress.json` of a run."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / PROGRESS_FILE
        self._pace = Pace()
        self._of = ""
        self._written = ("", -_EVERY)  # name of the stage, and when

    def begin(self, stage: str) -> None:
        """A stage such as "round-01/train" begins."""
        self._of = stage
        self._pace.begin()

    def close(self) -> None:
        """Removes the file."""
        with contextlib.suppress(OSError):
            self._path.unlink()

    def update(self, **fields: Any) -> None:
        """Takes the fields of a `progress` event. The file is written about once a second."""
        progress = self._pace(**fields)
        now = time.monotonic()
        name, when = self._written
        if name == progress.stage and now - when < _EVERY and progress.done < progress.total:
            return
        self._written = progress.stage, now
        # Renamed, so that nobody reads half of it, and not synced: it is of this moment.
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}{TEMPORARY}")
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps({"time": time.time(), "of": self._of, **asdict(progress)}), "utf-8")
            temporary.replace(self._path)


def read_progress(folder: Path, stage: str) -> Progress | None:
    """The last progress of a stage such as "round-01/train"; None if there is none, or it is damaged."""
    try:
        value = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
        if value["of"] != stage or not all(type(value[name]) is str for name in ("stage", "unit")):
            return None
        speed = finite_number(value["per_second"])
        if speed is None or not all(type(value[name]) is int and value[name] >= 0 for name in ("done", "total")):
            return None
        return Progress(value["stage"], value["done"], value["total"], value["unit"], max(0.0, speed))
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return None
