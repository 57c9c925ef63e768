"""Shards of a stage dealt over groups of devices: one process per group, each with its own GPUs.

A stage's working half is a function `work(items, report=…, **arguments)` that asks `items` for the next shard (an
index into the stage's list) whenever it wants one, and reports ("item", number=n) once shard n is whole on disk under
its final name. With one group it runs in this process; with several, each has a process (dice_py/process.py) that runs
it, and this one, the driver, deals. A shard counts as done when a group has said so and its file is whole, and nothing
else counts as success.

What a failure means. An error of data, usage, disk or an interruption: the stage ends with it at once. Anything else
(out of memory, a bug, a death, an end before the work is done): the process is gone, and the shards that it held go
back to the front of the queue, for other groups only, since it is not known which of them broke it. A shard that failed
on `devices.shard_attempts` groups, or on all that are left, ends the stage. A group whose process raised an error after
it had completed a shard gets a new one for further shards; any other is dead (`devices.on_dead_group`).

Events, beside those of dice_py/worker.py:

    advance     count                        units (responses, sequences) that got done, from a group's work
    item        number                       the shard is whole; the dealer's alone, not passed on
    group       number, gpus, status, text   "started"; "retry": failed, and may start again; "dead", with the log's end
    note, process, throughput                as the group sent them, with `group`, its number
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dice_py.clock import clocked
from dice_py.dealer import VISIBLE, Dealer
from dice_py.dealer import Group as Group
from dice_py.errors import UsageError
from dice_py.process import cuda_unstarted, resolve

if TYPE_CHECKING:
    from dice_py.artefacts import Report
    from dice_py.config import DevicesConfig, ModelConfig


class Items(Protocol):
    """Where a stage's working half gets its shards from."""

    def take(self, *, wait: bool) -> int | None:
        """The next shard for this group, or None.

        With wait=False, None means that there is none right now. With wait=True it blocks until there is one (another
        group's may come back), and None means that there will be no more: the work is to return. Whoever waits while
        it holds shards must finish them from another thread, since it waits until every shard is whole.
        """
        ...


# --- which groups there are -----------------------------------------------------------------------------------


def device_in_group(models: ModelConfig) -> ModelConfig:
    """`models` for the work of a group, which sees its own GPUs only: an explicit `cuda:N` is its first there."""
    return models.model_copy(update={"device": "cuda:0"}) if models.device.startswith("cuda:") else models


def find_groups(
    devices: DevicesConfig, models: ModelConfig, *, size: int = 1, report: Report | None = None
) -> list[Group]:
    """The groups that work on a stage's shards; no CUDA context is made.

    On the CPU: `devices.cpu_processes` groups, which share the cores that this process may use. With CUDA: groups of
    `size` GPUs each, of those that CUDA_VISIBLE_DEVICES (or the machine) has, `devices.gpus` and `model.device` allow.
    GPUs left over are told in a note.

    Raises:
        UsageError: a GPU that is not there, too few for one group, or settings that contradict each other.
    """
    from dice_py.models import placement

    with cuda_unstarted():
        # Only the device is asked for: to choose the dtype, torch would make a CUDA context here.
        device = placement(models.model_copy(update={"dtype": "float32"})).device
        visible = _visible_gpus() if device.startswith("cuda") else []
    if not device.startswith("cuda"):
        if devices.gpus != "all":
            raise UsageError(
                f"devices.gpus is {devices.gpus}, but the model is to be on {device} (model.device: {models.device}); "
                "leave devices.gpus out"
            )
        if size > 1:
            raise UsageError(
                f"generate.vllm.tensor_parallel_size is {size}, but model.device is {device}; set the first to 1"
            )
        if device != "cpu":
            return [Group(1)]
        threads = max(1, len(os.sched_getaffinity(0)) // devices.cpu_processes)
        return [Group(number + 1, threads=threads) for number in range(devices.cpu_processes)]
    used = _used_gpus(devices, models.device, len(visible))
    if len(used) < size:
        raise UsageError(
            f"generate.vllm.tensor_parallel_size is {size}, but the stage has {len(used)} GPU(s) to use (devices.gpus, "
            "model.device and CUDA_VISIBLE_DEVICES decide which); lower the first, or give it more"
        )
    chunks = [used[start : start + size] for start in range(0, len(used) - size + 1, size)]
    left = used[len(chunks) * size :]
    if left and report is not None:
        names = ", ".join(visible[gpu] for gpu in left)
        report("note", text=f"GPU(s) {names} stay idle: a group takes {size}")
    return [
        Group(number + 1, tuple(visible[gpu] for gpu in chunk), apart=chunk != list(range(size)))
        for number, chunk in enumerate(chunks)
    ]


def _visible_gpus() -> list[str]:
    """GPUs by the names that CUDA_VISIBLE_DEVICES has for them, in torch's order."""
    import torch

    count = torch.cuda.device_count()
    given = os.environ.get(VISIBLE)
    if given is None:
        return [str(number) for number in range(count)]
    # CUDA stops reading at the first entry that it does not know.
    return [entry.strip() for entry in given.split(",")][:count]


def _used_gpus(devices: DevicesConfig, device: str, visible: int) -> list[int]:
    """Numbers of the visible GPUs that the stage may use."""
    there = f"{visible} GPU(s) are visible, numbered from 0"
    listed = list(range(visible)) if devices.gpus == "all" else devices.gpus
    if not listed:
        raise UsageError(f"devices.gpus is an empty list; {there}: name some, or 'all'")
    for gpu in listed:
        if gpu >= visible:
            raise UsageError(f"devices.gpus names GPU {gpu}, but {there}; change it, or CUDA_VISIBLE_DEVICES")
        if listed.count(gpu) > 1:
            raise UsageError(f"devices.gpus names GPU {gpu} twice; a GPU belongs to one group")
    if not device.startswith("cuda:"):
        return listed
    number = device.removeprefix("cuda:")
    if not number.isdecimal() or int(number) >= visible:
        raise UsageError(f"model.device is {device!r}, but {there}; change it, or CUDA_VISIBLE_DEVICES")
    if int(number) not in listed:
        raise UsageError(f"model.device is {device!r}, but devices.gpus is {listed}; leave one of them out")
    return [int(number)]


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
        _here(work, arguments, items, groups[0], is_whole, report)
    else:
        Dealer(work, arguments, items, groups, is_whole, devices, logs, report).run()
    for number in items:
        if not is_whole(number):
            raise RuntimeError(f"the stage is over, but shard {number} is not whole")


class _Listed:
    """`Items` of the one group: a plain list."""

    def __init__(self, items: Sequence[int]) -> None:
        self._left = deque(items)

    def take(self, *, wait: bool) -> int | None:
        return self._left.popleft() if self._left else None


def _here(
    work: str,
    arguments: dict[str, Any],
    items: Sequence[int],
    group: Group,
    is_whole: Callable[[int], bool],
    report: Report,
) -> None:
    """The work in this process."""

    def hear(event: str, **fields: Any) -> None:
        if event != "item":
            report(event, **fields)
        elif not is_whole(fields["number"]):
            raise RuntimeError(f"shard {fields['number']} was reported as whole, and it is not")

    with only_these_gpus(group):
        with clocked("import"):
            function = resolve(work)
        function(_Listed(items), report=hear, **arguments)


@contextlib.contextmanager
def only_these_gpus(group: Group) -> Iterator[None]:
    """Hides other GPUs from this process. With CUDA started it is too late, but torch takes the first anyway."""
    torch = sys.modules.get("torch")
    before = os.environ.get(VISIBLE)
    hide = bool(group.gpus) and not (torch is not None and torch.cuda.is_initialized())
    if hide:
        os.environ[VISIBLE] = ",".join(group.gpus)
    try:
        yield
    finally:
        if hide and before is None:
            os.environ.pop(VISIBLE, None)
        elif hide and before is not None:
            os.environ[VISIBLE] = before
