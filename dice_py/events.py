"""How a stage reports what it does: `report(event, **fields)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Report = Callable[..., None]
"""How a stage tells what it does: `report(event, **fields)`; see compute/stage_process.py for the events."""


def no_report(event: str, **fields: Any) -> None:
    """A `Report` for callers that do not listen."""
