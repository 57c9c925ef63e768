"""What runs in the workers of a Ray cluster's nodes in tests/compute.

In `folder`, `item-N` is a complete item and holds the threads of its worker, and `tries-N` has a line for each worker
that took it: its process id.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dice_py.compute.shard_queue import ShardQueue
from dice_py.errors import DataError

if TYPE_CHECKING:
    from dice_py.events import Report


def slow(
    items: ShardQueue,
    *,
    folder: Path,
    seconds: float,
    bad: int | None = None,
    killed: int | None = None,
    report: Report,
) -> None:
    """Takes one item after the other, each of which takes some time.

    Args:
        bad: at this item it raises an error of the data.
        killed: the first worker that takes this item is killed.
    """
    print("the worker works")
    while (number := items.receive(wait=True)) is not None:
        tries = folder / f"tries-{number}"
        is_first = not tries.exists()
        with tries.open("a") as handle:
            handle.write(f"{os.getpid()}\n")
        time.sleep(seconds)
        if number == bad:
            raise DataError(f"row {number} is bad")
        if number == killed and is_first:
            os.kill(os.getpid(), signal.SIGKILL)
        temporary = folder / f".item-{number}-{os.getpid()}"
        temporary.write_text(f"{os.environ.get('OMP_NUM_THREADS')} thread")
        temporary.rename(folder / f"item-{number}")
        report("shard", file=f"item-{number}", key="", rows=1)
        report("shard_complete", number=number)
