"""A run folder: its config, manifest and events, and the processes that work in it.

One process at a time holds a folder (`.lock`). It imports neither torch nor transformers: what needs a model runs in
a process of its own, and that of the next stage is started while one works, to import what it will need.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dice_py.compute.gpu_monitor import GpuMonitor
from dice_py.compute.stage_process import WarmPool, run_stage
from dice_py.config.run import RunConfig
from dice_py.errors import DiskFullError, UsageError
from dice_py.events import Report, no_report
from dice_py.stages.registry import FOLLOWING, IMPORTS, REMEDIES
from dice_py.storage.files import Manifest, is_disk_full


class Run:
    """One run folder: its config, manifest, events and stages."""

    def __init__(
        self, folder: Path, config: RunConfig, report: Report = no_report, watch: GpuMonitor | None = None
    ) -> None:
        self.folder = folder
        self.config = config
        self.manifest = Manifest(folder / "manifest.json")
        self._listen = report
        self._watch = watch
        self._spares = WarmPool()

    def close(self) -> None:
        """Ends the process that was started ahead, if one is left."""
        self._spares.close()

    def report(self, event: str, **fields: Any) -> None:
        """Tells the listener, and keeps what is not mere progress in `events.jsonl`."""
        if event not in ("progress", "advance"):
            line = json.dumps({"time": round(time.time(), 3), "event": event, **fields}, default=str)
            try:
                with (self.folder / "events.jsonl").open("a", encoding="utf-8") as handle:
                    handle.write(line + "\n")
            except OSError as error:
                if not is_disk_full(error):
                    raise
                raise DiskFullError(
                    f"no room left on the disk for {self.folder / 'events.jsonl'}; nothing that was whole is lost. "
                    f"Free some space, then: dice resume {self.folder}"
                ) from error
        self._listen(event, **fields)

    def tell_gpus(self, stage: str | None) -> None:
        """Reports what the GPUs did since the last call, as that of `stage` (None: of what lies between stages)."""
        if self._watch is None:
            return
        gpus, problem = self._watch.take(), self._watch.problem
        if gpus:
            self.report("gpu", stage=stage, gpus=gpus)
        elif problem is not None:
            self._watch = None  # said once
            self.report("gpu", stage=stage, gpus=[], text=problem)

    def stage(
        self, name: str, key: str, whole: Callable[[dict[str, Any]], bool], work: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """The entry of stage `name`: the manifest's if its key is `key` and its files are whole, else made now."""
        entry = self.manifest.stage(name)
        if entry is not None and entry.get("key") == key and entry.get("status") == "done" and whole(entry):
            self.report("stage", stage=name, status="kept", seconds=entry["seconds"], counts=entry["counts"])
            return entry
        self.tell_gpus(None)
        started = time.time()
        self.manifest.record(name, key=key, status="running", started=started, seconds=None, counts={}, files=[])
        self.report("stage", stage=name, status="running")
        try:
            made = work()
        except BaseException:
            with contextlib.suppress(OSError, DiskFullError):  # what went wrong is not to be hidden by it
                self.tell_gpus(name)
            raise
        self.tell_gpus(name)
        seconds = time.time() - started
        self.manifest.record(name, status="done", seconds=seconds, **made)
        self.report("stage", stage=name, status="done", seconds=seconds, counts=made["counts"])
        entry = self.manifest.stage(name)
        assert entry is not None
        return entry

    def spawn(self, stage: str, work: str, folder: Path, *, following: str | None = None, **arguments: Any) -> Any:
        """Runs `work` ("module:function") in a process of its own, its output in `folder/worker.log`.

        Meanwhile the process of the next stage is started, and imports what it will need: that of `following`, or of
        the stage that always comes next.
        """
        spare = self._spares.take(IMPORTS[stage]) if stage in IMPORTS else None
        following = following or FOLLOWING.get(stage)
        if following is not None:
            self._spares.prepare(IMPORTS[following])
        log = folder / "worker.log"
        return run_stage(work, arguments, log=log, remedy=REMEDIES[stage], report=self.report, spare=spare)

    def path(self, name: str) -> Path:
        """A path in the run folder, from how the manifest names it."""
        return self.folder / name

    def relative(self, path: Path) -> str:
        """How the manifest names a path."""
        return str(path.relative_to(self.folder))


def new_run_folder(runs: Path) -> Path:
    """A folder that does not exist yet, named by the time."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = runs / stamp
    number = 1
    while folder.exists():
        number += 1
        folder = runs / f"{stamp}-{number}"
    return folder


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder against any other process.

    Raises:
        UsageError: another one holds it.
    """
    with (folder / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"{folder} is in use by another `dice` process; wait for it, or stop it") from None
        handle.write(str(os.getpid()))
        handle.flush()
        yield


def is_running(folder: Path) -> bool:
    """True while a process works in this run folder."""
    lock = folder / ".lock"
    if not lock.exists():
        return False
    with lock.open("r") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        fcntl.flock(handle, fcntl.LOCK_UN)
    return False


def end_torn_line(events: Path) -> None:
    """Ends the line in the middle of which a process was killed, so that it takes no later event with it."""
    if not events.is_file() or not events.stat().st_size:
        return
    with events.open("r+b") as handle:
        handle.seek(-1, os.SEEK_END)
        if handle.read(1) != b"\n":
            handle.write(b"\n")
