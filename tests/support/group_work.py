"""What runs in the processes of tests/compute. It imports little, so they start fast.

A group is known by its CUDA_VISIBLE_DEVICES. In `folder`, `item-N` is a complete item and holds the group that made it,
`tries-N` has a line for each group that took it, `starts-G` one for each process of a group: its id.
"""

from __future__ import annotations

import functools
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from processes import PATIENCE

from dice_py.compute.devices import Group
from dice_py.compute.dispatch import dispatch_shards
from dice_py.compute.executor import LocalExecutor
from dice_py.compute.shard_queue import ShardQueue
from dice_py.errors import DataError, OutOfMemoryError
from dice_py.timing import timed

if TYPE_CHECKING:
    from dice_py.events import Report

AT_IMPORT = dict(os.environ)
print("group_work is imported")


def me() -> str:
    return os.environ["CUDA_VISIBLE_DEVICES"]


def append(path: Path, line: str) -> None:
    with path.open("a") as handle:
        handle.write(line + "\n")


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def wait_until(path: Path, count: int = 1) -> None:
    end = time.monotonic() + PATIENCE
    while len(lines(path)) < count:
        if time.monotonic() > end:
            raise TimeoutError(f"waited for {path}")
        time.sleep(0.01)


def make(folder: Path, number: int) -> None:
    temporary = folder / f".item-{number}-{os.getpid()}"
    temporary.write_text(me() + "\n")
    temporary.rename(folder / f"item-{number}")


def fail(how: str, number: int) -> None:
    print(f"about to {how} at {number}")
    if how == "raise":
        raise ValueError(f"a bug at {number}")
    if how == "oom":
        raise OutOfMemoryError(f"no room for {number}")
    if how == "data":
        raise DataError(f"row {number} is bad")
    if how == "interrupt":
        raise KeyboardInterrupt
    if how == "exit":
        os._exit(0)
    if how in ("kill", "terminate"):
        os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGTERM)
        time.sleep(PATIENCE)


def planned(items: ShardQueue, *, folder: Path, plan: dict[int, list[str]], hold: int = 1, report: Report) -> None:
    """Takes up to `hold` items at a time; `plan[n]` is how the first, second, … try of item n goes, "ok" after it."""
    append(folder / f"starts-{me()}", str(os.getpid()))
    while True:
        held: list[tuple[int, str]] = []
        while len(held) < hold:
            number = items.receive(wait=not held)
            if number is None:
                break
            append(folder / f"tries-{number}", me())
            tried = len(lines(folder / f"tries-{number}"))
            held.append((number, [*plan.get(number, []), *["ok"] * tried][tried - 1]))
        if not held:
            return
        for number, how in held:
            if how == "return":
                return
            if how == "elsewhere":
                report("shard_complete", number=number + 100)
                time.sleep(PATIENCE)
            fail(how, number)
            if how != "lie":
                make(folder, number)
            report("advance", count=1)
            report("shard_complete", number=number)


def greedy(items: ShardQueue, *, folder: Path, of: int, report: Report) -> None:
    """Takes all items that it gets without waiting, and makes them when all groups have taken theirs."""
    number = items.receive(wait=True)
    held = []
    while number is not None:
        held.append(number)
        number = items.receive(wait=False)
    append(folder / "taken", str(len(held)))
    wait_until(folder / "taken", of)
    for number in held:
        make(folder, number)
        report("shard_complete", number=number)
    assert items.receive(wait=True) is None


def together(items: ShardQueue, *, folder: Path, of: int, then: str, report: Report) -> None:
    """Each of the groups takes one item. When all have, and have asked for another, the one with item 0 goes last."""
    number = items.receive(wait=True)
    assert number is not None
    append(folder / f"tries-{number}", me())
    append(folder / "have", me())
    wait_until(folder / "have", of)
    append(folder / "second", str(items.receive(wait=False)))
    wait_until(folder / "second", of)
    if number == 0:
        wait_until(folder / "item-1")
        fail(then, number)
    make(folder, number)
    report("shard_complete", number=number)
    while (number := items.receive(wait=True)) is not None:
        append(folder / f"tries-{number}", me())
        make(folder, number)
        report("shard_complete", number=number)


def fails_second(items: ShardQueue, *, folder: Path, how: str, report: Report) -> None:
    """Group 0's first process fails at its second item; group 1 makes nothing before that is over."""
    append(folder / f"starts-{me()}", str(os.getpid()))
    done = 0
    while (number := items.receive(wait=True)) is not None:
        append(folder / f"tries-{number}", me())
        if me() == "0" and done == 1 and len(lines(folder / "starts-0")) == 1:
            append(folder / "failed", str(number))
            fail(how, number)
        if me() == "1":
            wait_until(folder / "failed")
            if how == "raise":
                wait_until(folder / "starts-0", 2)
        make(folder, number)
        report("shard_complete", number=number)
        done += 1


def linger(items: ShardQueue, *, folder: Path, report: Report) -> None:
    items.receive(wait=True)
    append(folder / "pids", str(os.getpid()))
    report("note", text="waiting")
    time.sleep(10 * PATIENCE)


def drive(*, folder: Path, report: Report) -> None:
    """A stage's process, whose groups linger."""
    from dice_py.config.shared import DevicesConfig

    append(folder / "driver", str(os.getpid()))
    dispatch_shards(
        functools.partial(linger, folder=folder),
        shards=[0, 1, 2],
        executor=LocalExecutor([Group(number, (str(number),)) for number in (1, 2, 3)]),
        is_complete=lambda number: False,
        devices=DevicesConfig(),
        logs=folder,
        report=report,
    )


def describe(items: ShardQueue, *, folder: Path, report: Report) -> None:
    """Reports every kind of event, and what the environment was."""
    print("printed by the group")
    names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    while (number := items.receive(wait=True)) is not None:
        with timed("load"):
            time.sleep(0.05)
        report("note", text="a note")
        report("throughput", stage="describe", file=f"item-{number}", tokens=5)
        report("shard", file=f"item-{number}", environment={name: AT_IMPORT.get(name) for name in names})
        report("advance", count=3)
        (folder / f"item-{number}").write_text(str(os.getpid()))
        report("shard_complete", number=number)


def load_long(items: ShardQueue, *, folder: Path, report: Report) -> None:
    """Group 1 is still loading when the others have made everything."""
    if me() == "1":
        append(folder / "loading", str(os.getpid()))
        time.sleep(10 * PATIENCE)
    wait_until(folder / "loading")
    while (number := items.receive(wait=True)) is not None:
        make(folder, number)
        report("shard_complete", number=number)


def fails_at_the_end(items: ShardQueue, *, folder: Path, report: Report) -> None:
    while (number := items.receive(wait=True)) is not None:
        make(folder, number)
        report("shard_complete", number=number)
    raise ValueError("a bug at the end")


def fails_at_once(items: ShardQueue, *, folder: Path, how: str, report: Report) -> None:
    fail(how, -1)


def whoami(*, report: Report) -> dict[str, Any]:
    """The process, and the environment at the import of this module and now."""
    print("printed by the work")
    report("note", text="working")
    return {"pid": os.getpid(), "at_import": AT_IMPORT, "now": dict(os.environ)}
