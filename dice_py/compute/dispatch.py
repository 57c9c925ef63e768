"""Shards of a stage dealt over groups of devices: one process per group, each with its own GPUs.

A stage's working half is a function `work(items, report=…, **arguments)` that asks `items` for the next shard (an
index into the stage's list) whenever it wants one, and reports ("item", number=n) once shard n is whole on disk under
its final name. With one group it runs in this process; with several, each has a process (compute/worker.py) that runs
it, and this one, the driver, deals. A shard counts as done when a group has said so and its file is whole, and nothing
else counts as success.

What a failure means. An error of data, usage, disk or an interruption: the stage ends with it at once. Anything else
(out of memory, a bug, a death, an end before the work is done): the process is gone, and the shards that it held go
back to the front of the queue, for other groups only, since it is not known which of them broke it. A shard that failed
on `devices.shard_attempts` groups, or on all that are left, ends the stage. A group whose process raised an error after
it had completed a shard gets a new one for further shards; any other is dead (`devices.on_worker_failure`).

Events, beside those of compute/stage_process.py:

    advance     count                        units (responses, sequences) that got done, from a group's work
    item        number                       the shard is whole; the dealer's alone, not passed on
    group       number, gpus, status, text   "started"; "retry": failed, and may start again; "dead", with the log's end
    note, process, throughput                as the group sent them, with `group`, its number
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dice_py.compute.devices import Group
from dice_py.compute.process_pool import Dispatcher
from dice_py.compute.worker import resolve
from dice_py.timing import timed

if TYPE_CHECKING:
    from dice_py.config.shared import DevicesConfig
    from dice_py.events import Report
from dice_py.compute.devices import only_these_gpus


class ShardQueue(Protocol):
    """Where a stage's working half gets its shards from."""

    def receive(self, *, wait: bool) -> int | None:
        """The next shard for this group, or None.

        With wait=False, None means that there is none right now. With wait=True it blocks until there is one (another
        group's may come back), and None means that there will be no more: the work is to return. Whoever waits while
        it holds shards must finish them from another thread, since it waits until every shard is whole.
        """
        ...


# --- work over groups -----------------------------------------------------------------------------------------


def over_groups(
    work: str,
    arguments: dict[str, Any],
    *,
    items: Sequence[int],
    groups: list[Group],
    is_whole: Callable[[int], bool],
    devices: DevicesConfig,
    logs: Path,
    report: Report,
) -> None:
    """Has `work` ("module:function") done on all of `items`, by one group here or by a process for each of several.

    Returns only when `is_whole` holds for every item.

    Args:
        arguments: of the work, beside `items` and `report`; pickled where there are processes. `models` among them:
            see `device_in_group`.
        is_whole: whether an item's file is there under its final name with its key.
        logs: folder of the groups' logs, `group-N.log`.
        report: hears the events above. Of a shard that failed half way and is done again, `advance` comes twice.

    Raises:
        DiceError: as a group raised it; OutOfMemoryError (4) of a shard that no group has the memory for.
        RuntimeError: a bug, or a process that ended without a word; with the end of its log.
    """
    if not items:
        return
    if len(groups) == 1 and not groups[0].apart:
        run_inline(work, arguments, items, groups[0], is_whole, report)
    else:
        Dispatcher(work, arguments, items, groups, is_whole, devices, logs, report).run()
    for number in items:
        if not is_whole(number):
            raise RuntimeError(f"the stage is over, but shard {number} is not whole")


class LocalQueue:
    """`ShardQueue` of the one group: a plain list."""

    def __init__(self, items: Sequence[int]) -> None:
        self._left = deque(items)

    def receive(self, *, wait: bool) -> int | None:
        return self._left.popleft() if self._left else None


def run_inline(
    work: str,
    arguments: dict[str, Any],
    items: Sequence[int],
    group: Group,
    is_whole: Callable[[int], bool],
    report: Report,
) -> None:
    """The work in this process."""

    def on_event(event: str, **fields: Any) -> None:
        if event != "item":
            report(event, **fields)
        elif not is_whole(fields["number"]):
            raise RuntimeError(f"shard {fields['number']} was reported as whole, and it is not")

    with only_these_gpus(group):
        with timed("import"):
            function = resolve(work)
        function(LocalQueue(items), report=on_event, **arguments)
