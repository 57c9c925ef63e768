"""Shards of a stage, distributed over groups of devices: one process per group, each with its own GPUs.

The work is called as `work(shards, report=report)`. It asks `shards` for the next shard (an index into the stage's
list) whenever it wants one, and reports ("shard_complete", number=n) once shard n is complete on disk under its final
name. With one group the work runs in this process; with several, each group has a process (compute/worker.py) that
runs it, and this process dispatches. A shard counts as done when a group has reported it and its file is complete.

What a failure means. An error of data, usage, disk or an interruption ends the stage at once. After anything else (out
of memory, a bug, a killed process, a return before the work is done) the process is ended, and the shards that it held
go back to the front of the queue, for other groups only, since it is not known which shard caused the failure. A shard
that failed on `devices.shard_attempts` groups, or on all groups that are left, ends the stage. A group whose process
raised an error after it had completed a shard gets a new process for further shards; any other group is dead
(`devices.on_worker_failure`).

Events, beside those of compute/stage_process.py:

    advance         count                        units (responses, sequences) that a group's work has done
    shard_complete  number                       the shard is complete; consumed here, not passed on
    group           number, gpus, status, text   "started"; "retry": failed, may start again; "dead", with the log's end
    note, process, throughput                    as the group sent them, with `group`, its number

On a Ray cluster (compute/ray_executor.py), `group`, `shard`, `process` and `throughput` have the `node` too. Groups of
a node that joins the cluster get shards. Those of a node that is lost are dead, which is no failure of the shards that
they held: these go back to the queue, for every group.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dice_py.compute.devices import Group, find_groups, only_these_gpus
from dice_py.compute.executor import Executor, LocalExecutor
from dice_py.compute.process_pool import Dispatcher
from dice_py.compute.shard_queue import LocalQueue, ShardWork

if TYPE_CHECKING:
    from dice_py.config.shared import DevicesConfig, ModelConfig
    from dice_py.events import Report


@contextlib.contextmanager
def open_executor(
    devices: DevicesConfig,
    models: ModelConfig,
    *,
    size: int = 1,
    folder: Path,
    needs: Sequence[Path],
    report: Report,
) -> Iterator[Executor]:
    """The executor of `devices.executor`, for one stage.

    Args:
        size: GPUs of a group.
        folder: of the stage, where its shards and logs are written.
        needs: further folders that the work reads: of models.
        report: receives notes, and the events of nodes.

    Raises:
        UsageError: devices that are not there, or settings that contradict each other; a cluster that cannot be used.
    """
    if devices.executor == "local":
        yield LocalExecutor(find_groups(devices, models, size=size, report=report))
        return
    from dice_py.compute.ray_executor import open_ray

    with open_ray(devices, models, size=size, folder=folder, needs=needs, report=report) as executor:
        yield executor


def dispatch_shards(
    work: ShardWork,
    *,
    shards: Sequence[int],
    executor: Executor,
    is_complete: Callable[[int], bool],
    devices: DevicesConfig,
    logs: Path,
    report: Report,
    most_groups: int | None = None,
) -> None:
    """Does `work` on all of `shards`: in this process with one group of it, else in one process for each group.

    Returns only when `is_complete` holds for every shard.

    Args:
        work: the config of its models must be that of `Executor.models`.
        executor: has the groups.
        is_complete: whether a shard's file is there under its final name with its key.
        logs: folder of the groups' logs, `group-N.log`.
        report: receives the events above. Of a shard that failed half way and is done again, `advance` comes twice.
        most_groups: only so many groups work at a time.

    Raises:
        DiceError: as a group raised it; OutOfMemoryError (4) of a shard that no group has the memory for.
        RuntimeError: a bug, or a process that ended without a result; with the end of its log.
    """
    if not shards:
        return
    groups = executor.groups()[:most_groups]
    if executor.runs_here(groups):
        run_inline(work, shards, groups[0], is_complete, report)
    else:
        Dispatcher(work, shards, executor, is_complete, devices, logs, report, most_groups).run()
    for number in shards:
        if not executor.sees(is_complete, number, logs):
            raise RuntimeError(f"the stage has ended, but shard {number} is not complete")


def run_inline(
    work: ShardWork, shards: Sequence[int], group: Group, is_complete: Callable[[int], bool], report: Report
) -> None:
    """Runs the work in this process."""

    def on_event(event: str, **fields: Any) -> None:
        if event != "shard_complete":
            report(event, **fields)
        elif not is_complete(fields["number"]):
            raise RuntimeError(f"shard {fields['number']} was reported as complete, and it is not")

    with only_these_gpus(group):
        work(LocalQueue(shards), report=on_event)
