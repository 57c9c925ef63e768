"""Shards of `group_work` dispatched to groups of the test."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import group_work

from dice_py.compute.devices import Group
from dice_py.compute.dispatch import dispatch_shards
from dice_py.compute.executor import LocalExecutor
from dice_py.config.shared import DevicesConfig

Heard = list[tuple[str, dict[str, Any]]]


def three(count: int = 3) -> list[Group]:
    return [Group(number + 1, (str(number),)) for number in range(count)]


def deal(
    folder: Path,
    work: str,
    *,
    items: list[int],
    groups: list[Group] | None = None,
    report: Callable[..., None] | None = None,
    devices: DevicesConfig | None = None,
    **arguments: Any,
) -> Heard:
    """Dispatches shards to `group_work.work` in groups; the events."""
    heard: Heard = []
    dispatch_shards(
        functools.partial(getattr(group_work, work), folder=folder, **arguments),
        shards=items,
        executor=LocalExecutor(three() if groups is None else groups),
        is_complete=lambda number: (folder / f"item-{number}").is_file(),
        devices=devices or DevicesConfig(),
        logs=folder / "logs",
        report=report or (lambda event, **fields: heard.append((event, fields))),
    )
    return heard
