"""The callback by which stages report progress: `report(event, **fields)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Report = Callable[..., None]
"""Called as `report(event, **fields)`; compute/stage_process.py lists the events and their fields."""


def no_report(event: str, **fields: Any) -> None:
    """A `Report` that ignores every event."""
