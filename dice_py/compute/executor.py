"""Where the groups of devices of a stage work: `devices.executor`.

An executor knows the groups, and starts the process of each. compute/process_pool.py sends them shards, by the same
rules for all executors. `local` is this machine; `ray` (compute/ray_executor.py) are the nodes of a Ray cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dice_py.compute.devices import Group, device_in_group
from dice_py.compute.failures import Failure
from dice_py.compute.worker import Work, Worker

if TYPE_CHECKING:
    from dice_py.config.shared import ModelConfig


class GroupProcess(Protocol):
    """The handle to the process of a group; `compute.worker.Worker` is one, and says what each method does."""

    @property
    def ended(self) -> bool: ...

    def submit(self, work: Work, *, log: Path, name: str, environment: Mapping[str, str | None]) -> None: ...

    def reply(self, value: Any) -> None: ...

    def receive(self, timeout: float) -> tuple[str, dict[str, Any]] | None: ...

    def failure(self) -> Failure: ...

    def tail(self, lines: int = 30) -> str: ...

    def join(self, timeout: float | None = None) -> None: ...

    def terminate(self) -> None: ...

    def stop(self) -> None: ...


class Executor(Protocol):
    """The groups of a stage, and how their processes are started."""

    def groups(self) -> list[Group]:
        """The groups that can work now. Their numbers stay; a later call may have more of them, or fewer."""
        ...

    def start(self, group: Group) -> GroupProcess:
        """Starts the process of a group; `submit` gives it its work."""
        ...

    def wait(self, processes: Sequence[GroupProcess], timeout: float) -> None:
        """Returns when one of the processes has an event or has ended, at the latest after `timeout` seconds."""
        ...

    def wait_for_groups(self) -> None:
        """Called where no group is left, and shards are not complete. Returns when there may be a group again.

        Raises:
            DiceError, RuntimeError: there will be none.
        """
        ...

    def sees(self, is_complete: Callable[[int], bool], number: int, folder: Path) -> bool:
        """Whether a shard that a group has reported is complete, in `folder`."""
        ...

    def runs_here(self, groups: Sequence[Group]) -> bool:
        """Whether the work of these groups is done in this process, which then holds the models."""
        ...

    def models(self, models: ModelConfig) -> ModelConfig:
        """The config of the models for the work of a group."""
        ...


class LocalExecutor:
    """Groups of devices of this machine, which are the same all along."""

    def __init__(self, groups: list[Group]) -> None:
        self._groups = groups

    def groups(self) -> list[Group]:
        return self._groups

    def start(self, group: Group) -> Worker:
        return Worker()

    def wait(self, processes: Sequence[GroupProcess], timeout: float) -> None:
        sources = [one for process in processes if isinstance(process, Worker) for one in process.waitables]
        wait(sources, timeout=timeout)

    def wait_for_groups(self) -> None:
        raise RuntimeError("shards are not complete, and no group works on them")

    def sees(self, is_complete: Callable[[int], bool], number: int, folder: Path) -> bool:
        return is_complete(number)

    def runs_here(self, groups: Sequence[Group]) -> bool:
        return len(groups) == 1 and not groups[0].needs_process

    def models(self, models: ModelConfig) -> ModelConfig:
        return device_in_group(models)
