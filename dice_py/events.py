"""The callback by which stages report progress: `report(event, **fields)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Report = Callable[..., None]
"""Called as `report(event, **fields)`; compute/stage_process.py lists the events and their fields."""


def no_report(event: str, **fields: Any) -> None:
    """A `Report` that ignores every event."""


def notes_once(report: Report) -> Report:
    """A report that passes each note on once: several passes over one thing have the same to say of it."""
    seen: set[str] = set()

    def once(event: str, **fields: Any) -> None:
        if event == "note":
            if fields["text"] in seen:
                return
            seen.add(fields["text"])
        report(event, **fields)

    return once
