"""The work of a stage on its shards, and the queue that it gets them from. The rules are in compute/dispatch.py."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from dice_py.compute.worker import request

if TYPE_CHECKING:
    from dice_py.events import Report


class ShardQueue(Protocol):
    """The queue that the work of a group gets its shards from."""

    def receive(self, *, wait: bool) -> int | None:
        """The next shard for this group, or None.

        With wait=False, None means that there is none right now. With wait=True it blocks until there is one (another
        group's may come back), and None means that there will be no more: the work is to return. A caller that waits
        while it holds shards must finish them from another thread, since it waits until every shard is complete.
        """
        ...


class ShardWork(Protocol):
    """The work of one group, picklable: a frozen dataclass whose module imports nothing heavy, or a partial."""

    def __call__(self, shards: ShardQueue, *, report: Report) -> None:
        """Works until `shards` has no more."""
        ...


class LocalQueue:
    """The `ShardQueue` of a single group: a plain list."""

    def __init__(self, shards: Sequence[int]) -> None:
        self._left = deque(shards)

    def receive(self, *, wait: bool) -> int | None:
        return self._left.popleft() if self._left else None


class RemoteQueue:
    """The `ShardQueue` of a group's process: the dispatcher replies to its requests."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def receive(self, *, wait: bool) -> int | None:
        number: int | None = request(self._report, "receive", wait=wait)
        return number
