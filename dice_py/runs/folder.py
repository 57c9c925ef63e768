"""A run folder: its config, manifest and events, and the processes that work in it.

One process at a time holds a folder (`.lock`). It imports neither torch nor transformers: a stage that needs a model
runs in a process of its own, and the process of the next stage is started meanwhile, to import its modules.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from dice_py.compute.gpu_monitor import GpuMonitor
from dice_py.compute.stage_process import WarmPool, run_in_subprocess
from dice_py.config.run import RunConfig
from dice_py.errors import DamagedError, DiskFullError, InterruptedRunError, UsageError
from dice_py.events import Report, no_report
from dice_py.runs.adoption import adopted_stage, is_done
from dice_py.runs.progress import ProgressFile
from dice_py.runs.reasons import changes, field_values, listed
from dice_py.runs.removal import forget_stage, known_entry, restore_removed
from dice_py.runs.warnings import stage_warnings
from dice_py.stages.job import FAILURE, Job, StageFile, StageResult
from dice_py.stages.registry import REGISTRY, ROUND_STAGES, ROUND_ZERO_STAGES, stage_of
from dice_py.storage.digests import file_state, stored_digest
from dice_py.storage.files import Manifest, is_disk_full
from dice_py.storage.integrity import MODEL_STAMP, set_aside
from dice_py.storage.lock import exclusive_lock, is_locked
from dice_py.storage.removed import removed_in

_ENDING = (DamagedError, DiskFullError, InterruptedRunError)
"""Errors that end a stage which may fail, too: they are not of its work, and the next stage would meet them."""


class Run:
    """One run folder: its config, manifest, events and stages."""

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        report: Report = no_report,
        monitor: GpuMonitor | None = None,
        *,
        force: bool = False,
        siblings: Sequence[Path] = (),
        in_process: bool = False,
    ) -> None:
        self.folder = folder
        self.config = config
        self.force = force
        """Whether what does not fit into memory is tried all the same."""
        self.siblings = siblings
        """Folders of other runs, whose stages are taken over where the key is the same."""
        self.in_process = in_process
        """Whether stages run in this process, which then imports torch once: for models of a few MB."""
        self.manifest = Manifest(folder / "manifest.json")
        self.remade: list[str] = []
        """The stages that are made again because their key differs from the manifest's, in order."""
        self._warned: set[tuple[str, str]] = set()
        """Stages and texts of the warnings that were reported."""
        self._forward = report
        self._progress = ProgressFile(folder)
        self._monitor = monitor
        self._warm = WarmPool()
        if self.manifest.is_damaged:
            set_aside(
                self.manifest.path,
                self.report,
                "is damaged: not as it was written. Files that are whole are kept, by the keys that they carry",
            )
        if not self.manifest.data["stages"]:
            restore_removed(self.manifest)

    def close(self) -> None:
        """Ends the process that was started ahead, if one is left. No stage runs any more."""
        self._warm.close()
        self._progress.close()

    def round_folder(self, number: int) -> Path:
        """The folder of round `number`, from 1."""
        return self.folder / round_name(number)

    def report(self, event: str, **fields: Any) -> None:
        """Passes an event on, and appends it to `events.jsonl`; progress goes to `progress.json`."""
        if event == "progress":
            self._progress.update(**fields)
        elif event == "stage" and fields["status"] == "running":
            self._progress.begin(fields["stage"])
        if event not in ("progress", "advance"):
            line = json.dumps({"time": round(time.time(), 3), "event": event, **fields}, default=str)
            try:
                with (self.folder / "events.jsonl").open("a", encoding="utf-8") as handle:
                    handle.write(line + "\n")
            except OSError as error:
                if not is_disk_full(error):
                    raise
                raise DiskFullError(
                    f"no room left on the disk for {self.folder / 'events.jsonl'}; completed shards are kept. "
                    f"Free some space, then: dice resume {self.folder}"
                ) from error
        self._forward(event, **fields)

    def report_gpus(self, stage: str | None) -> None:
        """Reports the GPU figures since the last call, as those of `stage` (None: of the time between stages)."""
        if self._monitor is None:
            return
        gpus, problem = self._monitor.take(), self._monitor.problem
        if gpus:
            self.report("gpu", stage=stage, gpus=gpus)
        elif problem is not None:
            self._monitor = None  # reported once
            self.report("gpu", stage=stage, gpus=[], text=problem)

    def is_recorded(self, number: int, job: Job) -> bool:
        """Whether the manifest has the result of a job under its key. The files are not looked at."""
        entry = self.manifest.stage(f"{round_name(number)}/{stage_of(job).name}")
        return entry is not None and entry.get("key") == job.key() and is_done(entry)

    def run_stage(
        self, number: int, job: Job, *, is_last: bool = False, following: str | None = None, stays: bool = False
    ) -> StageResult:
        """The result of a job in round `number`: the manifest's if its key and files still hold, else made now.

        Args:
            is_last: no stage follows, whose process could be started meanwhile.
            following: the stage that follows, if it is not the one that the table of stages names.
            stays: its process is left for the next stage that needs the same modules, with the model that it holds. It
                ends when another stage begins that has a process, or when a stage is kept.
        """
        stage = stage_of(job)
        fields = job.key_fields()
        name, key = f"{round_name(number)}/{stage.name}", job.key()
        entry = known_entry(self.manifest, name, key)
        if entry is not None and entry.get("key") == key and is_done(entry):
            files = self._files(entry)
            incomplete = job.incomplete(files)
            if not incomplete:
                self.report("stage", stage=name, status="kept", seconds=entry["seconds"], counts=entry["counts"])
                self._warm.end_stayed()
                kept = StageResult(files, entry["counts"])
                self._warn(number, stage.name, job, kept)
                return kept
            self._report_incomplete(name, incomplete)
        elif entry is not None and entry.get("key") != key:
            self._report_changed(name, entry, field_values(fields))
        adopted = adopted_stage(self.siblings, self.folder, name, job)
        if adopted is not None:
            return self._take_over(number, job, name, field_values(fields), adopted)
        self.report_gpus(None)
        started = time.time()
        values = field_values(fields)
        self.manifest.record(
            name,
            key=key,
            inputs=values,
            status="running",
            started=started,
            seconds=None,
            counts={},
            files=[],
            warnings=[],
        )
        self.report("stage", stage=name, status="running")
        try:
            result = self._work(job, self.folder / name, is_last, following, stays)
        except BaseException as error:
            with contextlib.suppress(OSError, DiskFullError):  # the stage's own error is the one to report
                self.report_gpus(name)
            if not stage.may_fail or not isinstance(error, Exception) or isinstance(error, _ENDING):
                raise
            # Without files it is not complete, so that a resume does it again.
            result = StageResult([], {FAILURE: f"{type(error).__name__}: {error}"[:2000]})
        self.report_gpus(name)
        forget_stage(self.manifest, name)
        seconds = time.time() - started
        named = self._named(result.files)
        self.manifest.record(name, status="done", seconds=seconds, files=named, counts=result.counts)
        self.report("stage", stage=name, status="done", seconds=seconds, counts=result.counts)
        self._warn(number, stage.name, job, result)
        return result

    def _take_over(
        self, number: int, job: Job, name: str, values: dict[str, Any], entry: dict[str, Any]
    ) -> StageResult:
        """Records a stage whose files came from another run, with the seconds that it took there."""
        result = StageResult(self._files(entry), entry["counts"])
        self.manifest.record(
            name,
            key=job.key(),
            inputs=values,
            status="done",
            started=time.time(),
            seconds=entry["seconds"],
            counts=result.counts,
            files=self._named(result.files),
            warnings=[],
        )
        self.report("stage", stage=name, status="kept", seconds=entry["seconds"], counts=result.counts)
        self._warm.end_stayed()
        self._warn(number, stage_of(job).name, job, result)
        return result

    def _named(self, files: list[StageFile]) -> list[dict[str, Any]]:
        """How the manifest names files, with their digests."""
        return [{"file": self._relative(file), "key": key, "digest": _digest_of(file)} for file, key in files]

    def _warn(self, number: int, stage: str, job: Job, result: StageResult) -> None:
        """Reports the warnings about a stage, each once, and keeps them in the manifest, for the report."""
        name = f"{round_name(number)}/{stage}"
        warnings = (self.manifest.stage(name) or {}).get("warnings", [])
        if removed_in(self.folder / name) is None:  # else those of the time when the files were there
            warnings = [asdict(warning) for warning in stage_warnings(stage, job, result, self.config.warnings)]
        for warning in warnings:
            if (name, warning["text"]) not in self._warned:
                self._warned.add((name, warning["text"]))
                self.report("warning", round=number, stage=stage, **warning)
        if warnings != (self.manifest.stage(name) or {}).get("warnings", []):
            self.manifest.record(name, warnings=warnings)

    def _report_incomplete(self, name: str, incomplete: list[Path]) -> None:
        """Notes, and sets aside, what is damaged of a stage that was done."""
        for path in incomplete:
            if not path.exists():
                self.report("note", text=f"{name}: {path} is missing: made again")
            elif path.is_file() and file_state(path) != "intact":
                set_aside(path, self.report)
            elif path.is_dir() and path.suffix in (".json", ".parquet"):
                set_aside(path, self.report, "is a folder, where a file belongs")
            # A model is set aside by its stage, with the name of the file.

    def _report_changed(self, name: str, entry: dict[str, Any], values: dict[str, Any]) -> None:
        """Notes why a stage that has a key is made again."""
        before = entry.get("inputs")
        why = "an earlier version of dice made it" if before is None else listed(changes(before, values))
        first = "" if self.remade else " (the first stage that is)"
        self.remade.append(name)
        self.report("note", text=f"{name} is made again{first}, because of: {why or 'the way its key is made'}")

    def _work(self, job: Job, folder: Path, is_last: bool, following: str | None, stays: bool) -> StageResult:
        if not (stage_of(job).has_process and job.needs_process):
            return job.run(self.report)
        return self.spawn(job, folder, is_last=is_last, following=following, stays=stays)

    def spawn(
        self,
        job: Job,
        folder: Path,
        *,
        is_last: bool = False,
        following: str | None = None,
        stays: bool = False,
    ) -> StageResult:
        """Runs a job in a process of its own, whose output is `folder/worker.log`.

        Meanwhile the process of the next stage is started, and imports what that stage needs. `is_last`, `following`
        and `stays` as in `run_stage`.
        """
        stage = stage_of(job)
        if self.in_process:
            return job.run(self.report)
        warm = self._warm.take(stage.imports) if stage.imports else None
        self._warm.end_stayed()
        following = following or stage.following
        if following is not None and not is_last:
            self._warm.prepare(REGISTRY[following].imports)
        keep = partial(self._warm.keep, stage.imports) if stays else None
        result: StageResult = run_in_subprocess(
            job.run,
            log=folder / "worker.log",
            remedy=stage.remedy,
            report=self.report,
            warm=warm,
            keep=keep,
            grace=self.config.rounds.grace_seconds if stage.stops_when_asked else None,
        )
        return result

    def list_files(self, *paths: Path | None) -> None:
        """Names files that are no stage's (data, prompts, buffer) in the manifest, with their digests."""
        others = self.manifest.data.setdefault("others", {})
        for path in paths:
            if path is not None and path.is_relative_to(self.folder):
                others[self._relative(path)] = stored_digest(path)

    def _files(self, entry: dict[str, Any]) -> list[StageFile]:
        return [(self.folder / made["file"], made["key"]) for made in entry["files"]]

    def _relative(self, path: Path) -> str:
        """How the manifest names a path."""
        return str(path.relative_to(self.folder))


def _digest_of(path: Path) -> str | None:
    """The digest that an artifact carries: in a model folder, that of its stamp, which has those of the files."""
    return stored_digest(path / MODEL_STAMP if path.is_dir() else path)


def round_name(number: int) -> str:
    """ "round-01" for round 1."""
    return f"round-{number:02d}"


def stage_names(config: RunConfig, rounds: int | None = None) -> list[str]:
    """The names of all stages of a run ("round-01/generate"), in order of work; round 0 comes first if it has one.

    Args:
        rounds: of a run that ended after fewer rounds than its config has.
    """
    last = config.rounds.count if rounds is None else rounds
    names = [f"{round_name(0)}/{stage}" for stage in ROUND_ZERO_STAGES] if config.has_round_zero else []
    stages = [*ROUND_STAGES]
    if config.train.method == "mpo":
        stages.insert(stages.index("train") + 1, "reinforce")
    if config.extrapolate.tried:
        stages.insert(stages.index("evaluate"), "extrapolate")
    if config.evaluate.command is not None:
        stages.append("benchmark")
    return names + [f"{round_name(number)}/{stage}" for number in range(1, last + 1) for stage in stages]


def new_run_folder(runs: Path) -> Path:
    """A folder that does not exist yet, named after the time."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = runs / stamp
    number = 1
    while folder.exists():
        number += 1
        folder = runs / f"{stamp}-{number}"
    return folder


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks the folder against any other process.

    Raises:
        UsageError: another process holds it, or it has links or devices, through which a run would write elsewhere.
    """
    with contextlib.ExitStack() as stack:
        check_plain(folder, links=False)
        try:
            stack.enter_context(exclusive_lock(folder / ".lock", wait=False))
        except BlockingIOError:
            raise UsageError(f"{folder} is in use by another `dice` process; wait for it, or stop it") from None
        yield


def check_plain(folder: Path, *, links: bool) -> None:
    """Checks that a run folder holds files and folders only. It may be a link itself.

    Args:
        links: whether there may be links to files and folders, as where nothing is written.

    Raises:
        UsageError: naming the first pipe, socket, device, or link.
    """
    pending = [folder]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(Path(entry.path))
                elif not entry.is_file(follow_symlinks=False):
                    leads = entry.is_file() or entry.is_dir() or not Path(entry.path).exists()
                    if links and entry.is_symlink() and leads:
                        continue
                    what = "a symbolic link" if entry.is_symlink() else "neither a file nor a folder"
                    raise UsageError(
                        f"{entry.path} is {what}; a run writes only inside its own folder. Remove it, or put the file "
                        "or folder itself in its place"
                    )


def is_running(folder: Path) -> bool:
    """True while a process works in this run folder."""
    return is_locked(folder / ".lock")


def end_torn_line(events: Path) -> None:
    """Ends a line in which a process was killed, so that the next event starts on a line of its own."""
    if not events.is_file() or not events.stat().st_size:
        return
    with events.open("r+b") as handle:
        handle.seek(-1, os.SEEK_END)
        if handle.read(1) != b"\n":
            handle.write(b"\n")
