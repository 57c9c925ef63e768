"""`Dispatcher`: sends a stage's shards to the processes of several groups, and handles their failures.

The rules are those of compute/dispatch.py, which calls this.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dice_py.compute.devices import Group
from dice_py.compute.executor import Executor, GroupProcess
from dice_py.compute.failures import Failure
from dice_py.compute.shard_queue import RemoteQueue, ShardWork
from dice_py.compute.worker import work_name

if TYPE_CHECKING:
    from dice_py.config.shared import DevicesConfig
    from dice_py.events import Report

_ENDING = 60.0  # seconds that processes have to end in once every shard is complete
_JOINING = 2.0  # seconds between two looks for new groups


@dataclass(frozen=True)
class GroupWork:
    """The work of a group's process: the stage's work, on shards from the dispatcher."""

    work: ShardWork
    threads: int | None
    """Of torch; None: as torch decides."""

    def __call__(self, *, report: Report) -> None:
        """Works until the dispatcher has no more shards."""
        torch = sys.modules.get("torch")
        if torch is not None and self.threads is not None:
            torch.set_num_threads(self.threads)
        self.work(RemoteQueue(report), report=report)


@dataclass
class _Member:
    """A group and the state of its process."""

    group: Group
    log: Path
    worker: GroupProcess | None = None
    alive: bool = True  # has a process, or may get one
    requested: bool = False  # this and the rest: since its process started
    waiting: bool = False
    waits: bool = False  # for a shard, where there is none right now
    completed: int = 0
    held: list[int] = field(default_factory=list)


def _node(group: Group) -> dict[str, str]:
    """The field `node` of an event, on a cluster."""
    return {} if group.node is None else {"node": group.node}


def _reason(failure: Failure) -> str:
    """A failure in one line."""
    lines = failure.text.strip().splitlines() or [failure.kind]
    return lines[-1] if failure.kind == "bug" else lines[0]


class Dispatcher:
    """Sends shards to the groups' processes and handles their events, until every shard is complete."""

    def __init__(
        self,
        work: ShardWork,
        shards: Sequence[int],
        executor: Executor,
        is_complete: Callable[[int], bool],
        devices: DevicesConfig,
        logs: Path,
        report: Report,
        most_groups: int | None = None,
    ) -> None:
        self.work, self.executor, self.logs, self.most = work, executor, logs, most_groups
        self.members: list[_Member] = []
        self.looked = 0.0  # time.monotonic() of the last look for groups
        self.queue = list(dict.fromkeys(shards))
        self.open = set(self.queue)  # not complete yet: in the queue, or held
        self.tried: dict[int, list[Group]] = {}  # groups that a shard failed on
        self.is_complete, self.devices, self.report = is_complete, devices, report

    def run(self) -> None:
        """Returns when every shard is complete and the processes have ended."""
        try:
            while self.open:
                self._join()
                self._start()
                if not self._running():
                    self.executor.wait_for_groups()
                    self.looked = 0.0
                    continue
                self._handle_events()
            # A process that has not requested a shard yet is still loading a model, which nobody needs any more.
            for member in self._running():
                if not member.requested:
                    self._stop(member)
            self._assign()
            deadline = time.monotonic() + _ENDING
            while self._running() and time.monotonic() < deadline:
                self._handle_events()
            for member in self._running():
                text = f"{member.group} did not end within {_ENDING:.0f} s, and was stopped"
                self.report("note", text=text, group=member.group.number)
        finally:
            for member in self._running():
                assert member.worker is not None
                member.worker.terminate()
            for member in self._running():
                self._stop(member)

    def _running(self) -> list[_Member]:
        return [member for member in self.members if member.worker is not None]

    def _stop(self, member: _Member) -> None:
        assert member.worker is not None
        member.worker.stop()
        member.worker = None

    def _join(self) -> None:
        """Takes in the groups that the executor has now, at the first call and every few seconds."""
        if self.looked and time.monotonic() - self.looked < _JOINING:
            return
        self.looked = time.monotonic()
        known = {member.group.number for member in self.members}
        for group in self.executor.groups():
            living = sum(member.alive for member in self.members)
            if group.number not in known and (self.most is None or living < self.most):
                self.members.append(_Member(group, self.logs / f"group-{group.number}.log"))

    def _start(self) -> None:
        """Starts groups that have shards to work on: at first, and when a shard came back that no running one takes."""
        loading = sum(not member.requested for member in self._running())
        for member in self.members:
            eligible = sum(member.group not in self.tried.get(number, []) for number in self.queue)
            if member.worker is not None or not member.alive or eligible <= loading:
                continue
            loading += 1
            member.worker = self.executor.start(member.group)
            member.requested = member.waiting = False
            member.completed = 0
            self._report_group(member, "started", "")
            member.worker.submit(
                GroupWork(self.work, member.group.threads),
                log=member.log,
                name=work_name(self.work),
                environment=member.group.environment,
            )

    def _report_group(self, member: _Member, status: str, text: str) -> None:
        group = member.group
        self.report("group", number=group.number, gpus=list(group.gpus), status=status, text=text, **_node(group))

    def _handle_events(self) -> None:
        running = self._running()
        self.executor.wait([member.worker for member in running if member.worker is not None], 1.0)
        for member in running:
            if member.worker is None:
                continue
            received = member.worker.receive(0)
            if received is not None:
                self._handle(member, *received)
            elif member.worker.ended:
                self._failed(member, member.worker.failure())

    def _handle(self, member: _Member, event: str, fields: dict[str, Any]) -> None:
        group = member.group
        if event == "receive":
            member.requested = member.waiting = True
            member.waits = fields["wait"]
            self._assign()
            if member.waiting and not fields["wait"]:
                self._reply(member, None)
        elif event == "shard_complete":
            self._completed(member, fields["number"])
        elif event == "failed":
            self._failed(member, Failure(**fields))
        elif event == "result":
            if self.open:
                self._failed(member, Failure("bug", 1, "returned before every shard was complete", died=True))
            else:
                assert member.worker is not None
                member.worker.join(_ENDING)
                self._stop(member)
        elif event == "note":
            self.report(event, **{**fields, "text": f"group {group.number}: {fields['text']}", "group": group.number})
        elif event in ("process", "throughput"):
            self.report(event, **fields, group=group.number, **_node(group))
        elif event == "shard":
            self.report(event, **fields, **_node(group))
        else:
            self.report(event, **fields)

    def _assign(self) -> None:
        """Replies to the groups that wait, if there are shards for them, or will be no more."""
        for member in self._running():
            if not member.waiting or (not member.waits and self._has_share(member)):
                continue
            for number in self.queue:
                if member.group not in self.tried.get(number, []):
                    self.queue.remove(number)
                    member.held.append(number)
                    self._reply(member, number)
                    break
            else:
                if not self.open:
                    self._reply(member, None)

    def _has_share(self, member: _Member) -> bool:
        """Whether a group holds its part of the shards that are not complete, and leaves the others to other groups.

        An engine with room for all shards would take all of them while another group still loads its model.
        """
        return len(member.held) * len(self._running()) >= len(self.open)

    def _reply(self, member: _Member, number: int | None) -> None:
        assert member.worker is not None
        member.waiting = False
        member.worker.reply(number)

    def _completed(self, member: _Member, number: int) -> None:
        if number not in member.held:
            self._failed(member, Failure("bug", 1, f"reported shard {number} as complete, which it does not hold"))
        elif not self.executor.sees(self.is_complete, number, self.logs):
            self._failed(member, Failure("bug", 1, f"reported shard {number} as complete, and it is not"))
        else:
            member.held.remove(number)
            member.completed += 1
            self.open.discard(number)

    def _failed(self, member: _Member, failure: Failure) -> None:
        assert member.worker is not None
        # The process ends before another group gets its shards, so that no file has two writers.
        worker, group = member.worker, member.group
        self._stop(member)
        if not failure.lost:
            for number in member.held:
                self.tried.setdefault(number, []).append(group)
        self.queue[:0] = member.held
        held, member.held = member.held, []
        if not failure.died and failure.kind not in ("OutOfMemoryError", "bug"):
            raise failure.error(failure.text)
        member.alive = not failure.died and member.completed > 0
        reason = _reason(failure)
        log = f"the end of {member.log}:\n"
        self._report_group(member, "retry" if member.alive else "dead", f"{reason}\n{log}{worker.tail(15)}")
        if not self.open:
            text = f"{group} failed after every shard was complete: {reason}"
            self.report("note", text=text, group=group.number)
            return
        tail = worker.tail()
        if failure.kind == "bug" and not failure.died and reason not in tail:
            tail = f"{tail}\n{failure.text}"
        last = f"{group}: {reason}\n{log}{tail}"
        self._check_attempts(failure, last)
        if not member.alive and self.devices.on_worker_failure == "abort":
            raise failure.error(
                "a group is dead, and devices.on_worker_failure is 'abort' ('continue' leaves its shards to other "
                f"groups); {last}"
            )
        shards = f" while it held shard {' and '.join(map(str, held))}" if held else ""
        state = "it gets a new process if there is more to do" if member.alive else "the others continue without it"
        self.report("note", text=f"{group} failed{shards}; {state}: {reason} ({member.log})", group=group.number)
        self._assign()

    def _check_attempts(self, failure: Failure, last: str) -> None:
        """Raises when a shard has failed too often, or no group is left to work."""
        living = [member.group for member in self.members if member.alive]
        if failure.lost and not living:
            return  # the executor may get others
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
