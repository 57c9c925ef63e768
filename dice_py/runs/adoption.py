"""Stages taken over from other runs: what has the same key is the same, and is not made twice.

The runs of an ablation share a seed, and so often their first stages (`dice ablate`). Files are linked where the file
system can, and copied where it cannot. Every artifact is written to a temporary name and renamed, so a run that makes
one again leaves the other run's file as it was.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dice_py.stages.job import Job
from dice_py.storage.files import Manifest, atomic, make_folder
from dice_py.storage.integrity import MODEL_STAMP
from dice_py.storage.removed import was_removed

_OF_ONE_RUN = {"worker.log"}
_WRITTEN_IN_PLACE = (".jsonl", ".log")
"""Suffixes of files that are appended to: a link would change the other run's."""


def is_done(entry: dict[str, Any]) -> bool:
    """Whether a stage of a manifest is done; one whose entry lacks a field is made again."""
    return entry.get("status") == "done" and {"seconds", "counts", "files"} <= entry.keys()


def adopted_stage(siblings: Sequence[Path], folder: Path, name: str, job: Job) -> dict[str, Any] | None:
    """The manifest's entry of a stage that another run has done under the same key; its files are in `folder` then.

    Args:
        siblings: the folders of the other runs.
        folder: of this run.
        name: of the stage ("round-01/generate"), the same in both.

    Returns:
        None: no other run has the stage, or its files are not complete. What was linked by then does no harm: a file
        counts only under its key.
    """
    if not siblings:
        return None
    key = job.key()
    for sibling in siblings:
        entry = Manifest(sibling / "manifest.json").stage(name)
        if entry is None or entry.get("key") != key or not is_done(entry):
            continue
        with contextlib.suppress(FileNotFoundError):  # the other run's file is gone: this one makes it
            if any(was_removed(sibling / made["file"]) for made in entry["files"]):
                continue
            for made in entry["files"]:
                _link(sibling / made["file"], folder / made["file"])
            _link_others(sibling / name, folder / name)
            if not job.incomplete([(folder / made["file"], made["key"]) for made in entry["files"]]):
                return entry
    return None


def adopt_evaluated(siblings: Sequence[Path], folder: Path) -> None:
    """Brings what the evaluations of a run share (samples of the start, log-probabilities) from other runs, by key.

    Each of these files carries its key, by which an evaluation keeps it or makes it again.
    """
    for sibling in siblings:
        shared = sibling / "evaluate"
        for file in sorted(shared.rglob("*.parquet")):
            target = folder / file.relative_to(sibling)
            if not target.exists():
                _link(file, target)


def _link_others(source: Path, target: Path) -> None:
    """What a stage has written beside its artifacts, such as the log of a training."""
    for file in sorted(source.iterdir()):
        is_plain = file.is_file() and file.name not in _OF_ONE_RUN and not file.name.startswith(".")
        if is_plain and not (target / file.name).exists():
            _link(file, target / file.name, copied=file.suffix in _WRITTEN_IN_PLACE)


def _link(source: Path, target: Path, *, copied: bool = False) -> None:
    """Links a file or all files of a folder; what is there already is replaced."""
    if source.is_file() and target.is_file() and source.samefile(target):
        return  # linked before; renaming a link to a file over another link to it does nothing
    make_folder(target.parent)
    with atomic(target) as temporary:
        if source.is_dir():
            # The stamp last: a model folder without it is not complete.
            temporary.mkdir()
            names = sorted(source.rglob("*"), key=lambda path: (path.name == MODEL_STAMP, path))
            for path in names:
                own = temporary / path.relative_to(source)
                own.mkdir() if path.is_dir() else _one(path, own, copied)
        else:
            _one(source, temporary, copied)


def _one(source: Path, target: Path, copied: bool) -> None:
    if not copied:
        with contextlib.suppress(OSError):  # another file system, or one without links
            os.link(source, target)
            return
    shutil.copyfile(source, target)
