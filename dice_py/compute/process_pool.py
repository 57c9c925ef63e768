"""The driver of several groups: deals a stage's shards to their processes, and judges how each ends.

The rules are those of compute/dispatch.py, which calls this.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dice_py.compute.failures import Failure
from dice_py.compute.worker import Worker, ask, resolve
from dice_py.timing import timed

if TYPE_CHECKING:
    from dice_py.config.shared import DevicesConfig
    from dice_py.events import Report
from dice_py.compute.devices import Group

_LAST_WORDS = 60.0  # seconds that processes have to end in once every shard is whole


class RemoteQueue:
    """`ShardQueue` of a group's process: the driver answers."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def receive(self, *, wait: bool) -> int | None:
        number: int | None = ask(self._report, "receive", wait=wait)
        return number


def in_group(*, work: str, arguments: dict[str, Any], threads: int | None, report: Report) -> None:
    """What a group's process calls."""
    with timed("import"):
        function = resolve(work)
    torch = sys.modules.get("torch")
    if torch is not None and threads is not None:
        torch.set_num_threads(threads)
    function(RemoteQueue(report), report=report, **arguments)


@dataclass
class _Member:
    """A group, as the dealer sees it."""

    group: Group
    log: Path
    worker: Worker | None = None
    alive: bool = True  # has a process, or may get one
    asked: bool = False  # this and the rest: since its process started
    waiting: bool = False
    completed: int = 0
    held: list[int] = field(default_factory=list)


def _reason(failure: Failure) -> str:
    """In one line."""
    lines = failure.text.strip().splitlines() or [failure.kind]
    return lines[-1] if failure.kind == "bug" else lines[0]


class Dispatcher:
    """Deals items to groups' processes and hears them, until every item is whole."""

    def __init__(
        self,
        work: str,
        arguments: dict[str, Any],
        items: Sequence[int],
        groups: list[Group],
        is_whole: Callable[[int], bool],
        devices: DevicesConfig,
        logs: Path,
        report: Report,
    ) -> None:
        self.work, self.arguments = work, arguments
        self.members = [_Member(group, logs / f"group-{group.number}.log") for group in groups]
        self.queue = list(dict.fromkeys(items))
        self.open = set(self.queue)  # not whole yet: in the queue, or held
        self.tried: dict[int, list[Group]] = {}  # groups that an item failed on
        self.is_whole, self.devices, self.report = is_whole, devices, report

    def run(self) -> None:
        """Returns when every item is whole and the processes have ended."""
        try:
            while self.open:
                self._start()
                if not self._running():
                    raise RuntimeError(f"shards {sorted(self.open)} are not whole, and no group works on them")
                self._hear_all()
            # A process that has not asked yet, still loading a model, would load it for nothing.
            for member in self._running():
                if not member.asked:
                    self._end(member)
            self._deal()
            deadline = time.monotonic() + _LAST_WORDS
            while self._running() and time.monotonic() < deadline:
                self._hear_all()
            for member in self._running():
                text = f"{member.group} did not end by itself, and was ended"
                self.report("note", text=text, group=member.group.number)
        finally:
            for member in self._running():
                assert member.worker is not None
                member.worker.terminate()
            for member in self._running():
                self._end(member)

    def _running(self) -> list[_Member]:
        return [member for member in self.members if member.worker is not None]

    def _end(self, member: _Member) -> None:
        assert member.worker is not None
        member.worker.end()
        member.worker = None

    def _start(self) -> None:
        """Starts the groups that there are items for: at first, and when items came back that no running one takes."""
        loading = sum(not member.asked for member in self._running())
        for member in self.members:
            eligible = sum(member.group not in self.tried.get(number, []) for number in self.queue)
            if member.worker is not None or not member.alive or eligible <= loading:
                continue
            loading += 1
            member.worker = Worker()
            member.asked = member.waiting = False
            member.completed = 0
            self._tell(member, "started", "")
            member.worker.submit(
                in_group,
                {"work": self.work, "arguments": self.arguments, "threads": member.group.threads},
                log=member.log,
                name=self.work,
                environment=member.group.environment,
            )

    def _tell(self, member: _Member, status: str, text: str) -> None:
        group = member.group
        self.report("group", number=group.number, gpus=list(group.gpus), status=status, text=text)

    def _hear_all(self) -> None:
        running = self._running()
        wait([one for member in running if member.worker is not None for one in member.worker.awaited], timeout=1.0)
        for member in running:
            if member.worker is None:
                continue
            heard = member.worker.poll(0)
            if heard is not None:
                self._hear(member, *heard)
            elif member.worker.ended:
                self._failed(member, member.worker.death())

    def _hear(self, member: _Member, event: str, fields: dict[str, Any]) -> None:
        group = member.group
        if event == "receive":
            member.asked = member.waiting = True
            self._deal()
            if member.waiting and not fields["wait"]:
                self._answer(member, None)
        elif event == "item":
            self._completed(member, fields["number"])
        elif event == "failed":
            self._failed(member, Failure(**fields))
        elif event == "result":
            if self.open:
                self._failed(member, Failure("bug", 1, "returned before every shard was whole", died=True))
            else:
                assert member.worker is not None
                member.worker.join(_LAST_WORDS)
                self._end(member)
        elif event == "note":
            self.report(event, **{**fields, "text": f"group {group.number}: {fields['text']}", "group": group.number})
        elif event in ("process", "throughput"):
            self.report(event, **fields, group=group.number)
        else:
            self.report(event, **fields)

    def _deal(self) -> None:
        """Answers those who wait, as far as there are items for them, or will be no more."""
        for member in self._running():
            if not member.waiting:
                continue
            for number in self.queue:
                if member.group not in self.tried.get(number, []):
                    self.queue.remove(number)
                    member.held.append(number)
                    self._answer(member, number)
                    break
            else:
                if not self.open:
                    self._answer(member, None)

    def _answer(self, member: _Member, number: int | None) -> None:
        assert member.worker is not None
        member.waiting = False
        member.worker.answer(number)

    def _completed(self, member: _Member, number: int) -> None:
        if number not in member.held:
            self._failed(member, Failure("bug", 1, f"reported shard {number}, which it does not hold, as whole"))
        elif not self.is_whole(number):
            self._failed(member, Failure("bug", 1, f"reported shard {number} as whole, and it is not"))
        else:
            member.held.remove(number)
            member.completed += 1
            self.open.discard(number)

    def _failed(self, member: _Member, failure: Failure) -> None:
        assert member.worker is not None
        # Gone before anyone else gets its items: no file has two writers.
        worker, group = member.worker, member.group
        self._end(member)
        for number in member.held:
            self.tried.setdefault(number, []).append(group)
        self.queue[:0] = member.held
        held, member.held = member.held, []
        if not failure.died and failure.kind not in ("OutOfMemoryError", "bug"):
            raise failure.error(failure.text)
        member.alive = not failure.died and member.completed > 0
        reason = _reason(failure)
        log = f"the end of {member.log}:\n"
        self._tell(member, "retry" if member.alive else "dead", f"{reason}\n{log}{worker.tail(15)}")
        if not self.open:
            self.report("note", text=f"{group} failed after every shard was whole: {reason}", group=group.number)
            return
        tail = worker.tail()
        if failure.kind == "bug" and not failure.died and reason not in tail:
            tail = f"{tail}\n{failure.text}"
        last = f"{group}: {reason}\n{log}{tail}"
        self._check(failure, last)
        if not member.alive and self.devices.on_worker_failure == "abort":
            raise failure.error(
                "a group is dead, and devices.on_worker_failure is 'abort' ('continue' leaves its shards to other "
                "groups); " + last
            )
        shards = f" with shard {' and '.join(map(str, held))} in hand" if held else ""
        state = "it gets a new process if there is more for it" if member.alive else "the others go on without it"
        self.report("note", text=f"{group} failed{shards}; {state}: {reason} ({member.log})", group=group.number)
        self._deal()

    def _check(self, failure: Failure, last: str) -> None:
        """Raises when an item has failed too often, or nobody is left to work."""
        living = [member.group for member in self.members if member.alive]
        for number in self.queue:
            tried = self.tried.get(number, [])
            if not tried:
                continue
            if len(tried) >= self.devices.shard_attempts:
                why = f"as many as devices.shard_attempts allows ({self.devices.shard_attempts})"
            elif all(group in tried for group in living):
                why = "and no other group is left"
            else:
                continue
            names = " and ".join(map(str, tried))
            raise failure.error(f"shard {number} failed on {names}, {why}; the last, {last}")
        if not living:
            raise failure.error(f"no group of devices is left to work; the last, {last}")
