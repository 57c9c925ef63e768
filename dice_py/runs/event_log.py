"""Reads `events.jsonl`, the log of a run. It carries no digest, since it grows: what cannot be read is left out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Event = dict[str, Any]

_OF_A_GPU = ("index", "samples", "idle_samples")
_MAYBE_OF_A_GPU = ("memory_bytes", "mean_utilisation", "peak_memory_bytes")


def read_events(path: Path) -> list[Event]:
    """The events of a run, in order; none without a file. A line that a kill cut short, or is damaged, is left out."""
    events: list[Event] = []
    if not path.is_file():
        return events
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            event = parse_event(line)
            if event is not None:
                events.append(event)
    return events


def parse_event(line: str) -> Event | None:
    """The event of a line; None if it is damaged."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    named = isinstance(event, dict) and isinstance(event.get("event"), str)
    sound = named and finite_number(event.get("time")) is not None and _is_sound(event)
    return event if sound else None


class EventTail:
    """The events of a run as they come, for who follows it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new(self) -> list[Event]:
        """Those in the complete lines behind the ones that were read."""
        try:
            with self._path.open("rb") as handle:
                handle.seek(self._offset)
                text = handle.read()
        except FileNotFoundError:
            return []
        lines = text[: text.rfind(b"\n") + 1]
        self._offset += len(lines)
        parsed = (parse_event(line.decode("utf-8", errors="replace")) for line in lines.splitlines())
        return [event for event in parsed if event is not None]


def finite_number(value: Any) -> float | None:
    """A value as a float if it is a finite number, else None."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return float(value) if usable else None


def _is_sound(event: Event) -> bool:
    """Whether the fields that a profile needs are of the types that they are written in."""
    kind = event["event"]
    if kind == "round":
        return type(event.get("number")) is int
    if kind == "process":
        return isinstance(event.get("seconds"), dict | None) and isinstance(event.get("group"), int | None)
    if kind == "gpu":
        gpus = event.get("gpus")
        is_text = isinstance(event.get("text"), str | None)
        return is_text and (gpus is None or (isinstance(gpus, list) and all(map(_is_gpu, gpus))))
    return True


def _is_gpu(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    counted = all(type(value.get(name)) is int for name in _OF_A_GPU)
    measured = (value.get(name, "absent") for name in _MAYBE_OF_A_GPU)
    return counted and all(item is None or finite_number(item) is not None for item in measured)
