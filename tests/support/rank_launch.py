"""`launch` of the two ranks of rank_works.py, for tests and for their subprocesses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import rank_works
from places import SUPPORT, child_environment

from dice_py.training.launcher import launch

PLAIN = [sys.executable, str(SUPPORT / "rank_works.py")]


class Launch:
    """`launch` of two ranks, with the reported events."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.on_event: Callable[[], None] = lambda: None

    def __call__(self, work: str, command: list[str] = PLAIN, **arguments: Any) -> Any:
        return launch(
            command,
            rank_works.RANKS,
            partial(getattr(rank_works, work), **arguments),
            environment={"PYTHONPATH": child_environment()["PYTHONPATH"], "FLAVOUR": "vanilla"},
            report=self.report,
        )

    def report(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))
        self.on_event()
