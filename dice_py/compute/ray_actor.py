"""`GroupActor`: the actor of a group of devices on a node of a Ray cluster (compute/ray_executor.py).

It runs in a process of Ray, with the group's resources. The work is done by a worker process that it starts, as a stage
does on one machine. This module does not import Ray, which has imported it.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dice_py.compute.failures import Failure
from dice_py.compute.ray_cluster import enter
from dice_py.compute.worker import Work, Worker

_POLL = 5.0  # seconds after which a poll returns without an event
_SLICE = 0.05  # seconds that a poll holds the lock for


class GroupActor:
    """Starts the worker of a group, and passes its events on. Its methods are called from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worker: Worker | None = None

    def start(self, work: Work, *, log: Path, name: str, environment: Mapping[str, str | None], cwd: str) -> None:
        """Starts the worker with its work; see `Worker.submit`."""
        enter(cwd)
        # A spawned process would import the main module of its parent, which is Ray's.
        sys.modules["__main__"].__dict__.pop("__file__", None)
        with self._lock:
            self._worker = Worker()
            self._worker.submit(work, log=log, name=name, environment=environment)

    def poll(self) -> tuple[list[tuple[str, dict[str, Any]]], Failure | None]:
        """The worker's next events, after waiting for the first some seconds; and once it has ended, how.

        Whether it had a result is in the events.
        """
        worker = self._worker
        assert worker is not None
        events: list[tuple[str, dict[str, Any]]] = []
        deadline = time.monotonic() + _POLL
        while time.monotonic() < deadline:
            with self._lock:
                event = worker.receive(0 if events else _SLICE)
                if event is None and worker.ended:
                    return events, worker.failure()
            if event is not None:
                events.append(event)
            elif events:
                break
        return events, None

    def reply(self, value: Any) -> None:
        """Replies to what the worker has requested."""
        assert self._worker is not None
        self._worker.reply(value)

    def stop(self) -> None:
        """Ends the worker."""
        with self._lock:
            if self._worker is not None:
                self._worker.stop()
