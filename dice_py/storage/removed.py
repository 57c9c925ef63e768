"""What was removed of a run to free its space: neither damaged nor missing.

A folder of which files were removed (a model, the shards of a stage) keeps a record of them, `removed.json`. It is
written before the first file goes, so that a removal that was killed is known, and can be finished. With it a resume
knows keys and contents of the files that are gone; whoever must read one is told why it is not there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from dice_py.errors import RemovedError
from dice_py.storage.files import fsync, read_sealed, write_sealed

RECORD = "removed.json"
"""The record in a folder of which files were removed."""
_PLACES = ("round-*/*", "round-*/*/model", "round-*/*/*/model")
"""Where a run may have one. To search all of its folders would take seconds."""


@dataclass(frozen=True)
class Removed:
    """The record of a folder."""

    by: str
    """The setting or command that asked for it: "rounds.keep_models=1"."""
    files: dict[str, dict[str, Any]]
    """By name in the folder: `bytes`, and of a Parquet file its `key` and `meta`."""
    identity: str | None = None
    """Of a model (models/identity.py)."""
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By stage, what the manifest says of those that have read the files, should the manifest be lost."""

    @property
    def bytes(self) -> int:
        """The size of all files."""
        return sum(int(file["bytes"]) for file in self.files.values())


def removed_in(folder: Path) -> Removed | None:
    """The record of a folder; None if it has none, or if that is damaged."""
    file = folder / RECORD
    try:
        state = file.stat()
    except (OSError, ValueError):
        return None
    return _record(file, state.st_mtime_ns, state.st_size, state.st_ino)


@lru_cache(maxsize=16)
def _record(file: Path, *_: int) -> Removed | None:
    """The record in a file, which is read once for all of its shards: there may be tens of thousands."""
    stored = read_sealed(file)
    try:
        found = None if stored is None else Removed(**stored)
    except TypeError:  # another file of ours, under this name
        return None
    is_sound = found is None or all(name == Path(name).name for name in found.files)
    return found if is_sound else None


def was_removed(path: Path) -> Removed | None:
    """The record that names a file that is gone, or a model whose weights are; None for all others."""
    if path.is_dir():
        found = removed_in(path)
        if found is None or found.identity is None:
            return None
        # Not one whose weights were put back, or are still there since a kill came first.
        return None if all((path / name).is_file() for name in found.files) else found
    if os.path.lexists(path):
        return None
    found = removed_in(path.parent)
    return found if found is not None and path.name in found.files else None


def check_not_removed(path: Path) -> None:
    """Checks a file or a model folder that is about to be read.

    Raises:
        RemovedError: it was removed.
    """
    found = was_removed(path)
    if found is None:
        return
    what = path if path.is_dir() else path.parent / RECORD
    raise RemovedError(
        f"{path} was removed to free its space (by {found.by}), and is needed now. To have it made again, with all the "
        f"work that it took: delete {what}, and resume the run that it is of. Or start a new run"
    )


def remove_files(folder: Path, record: Removed) -> None:
    """Records the files of a folder as removed, and removes them. After a kill, the same call finishes the work."""
    write_sealed(folder / RECORD, asdict(record), "removed")
    for name in record.files:
        (folder / name).unlink(missing_ok=True)
    fsync(folder)


def forget_removed(folder: Path) -> None:
    """Deletes the record of a folder whose files are about to be made again."""
    (folder / RECORD).unlink(missing_ok=True)


def removals(folder: Path) -> Iterator[tuple[Path, Removed]]:
    """The folders of a run with such a record, in order of their paths, and the records."""
    files = [file for place in _PLACES for file in folder.glob(f"{place}/{RECORD}")]
    for file in sorted(files):
        found = removed_in(file.parent)
        if found is not None:
            yield file.parent, found
