"""Notices artifacts that are not as they were written, and sets them aside. Digests are in storage/digests.py.

A damaged artifact is as good as an absent one: it is renamed, a note says so, and the stage that makes it does so
again. A folder that is one artifact (a model, a checkpoint, the synthetic world) has a stamp, a JSON file that is
written last and lists the digest of every other file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dice_py.errors import DamagedError
from dice_py.events import Report
from dice_py.storage.digests import content_digest, file_state
from dice_py.storage.files import TEMPORARY, fsync, read_sealed, write_sealed
from dice_py.storage.parquet import parquet_key
from dice_py.storage.removed import check_not_removed, removed_in

MODEL_STAMP = "dice.json"
"""The stamp of a model folder, a checkpoint and a converted model."""

DAMAGED = ".damaged"
"""Suffix of what was set aside."""

_READERS = 4  # files of a folder that are read at a time


def set_aside(path: Path, report: Report, why: str = "is damaged: not as it was written") -> Path:
    """Renames a file or folder to `NAME.damaged` (or `NAME.damaged-2`, …), and reports a note."""
    aside = path.with_name(path.name + DAMAGED)
    number = 1
    while aside.exists() or aside.is_symlink():
        number += 1
        aside = path.with_name(f"{path.name}{DAMAGED}-{number}")
    path.rename(aside)
    report("note", text=f"{path} {why}. It is set aside as {aside.name} and made again")
    return aside


def is_kept(path: Path, key: str, report: Report) -> bool:
    """Whether a Parquet or sealed JSON file is there, intact, under `key`. A damaged one is set aside.

    It reads all of the file. One without a digest is damaged if it has the key, or if nothing can be read from it.
    """
    state = file_state(path)
    if state == "absent":
        if path.is_dir():
            set_aside(path, report, "is a folder, where a file belongs")
        return False
    is_json = path.suffix == ".json"
    if state == "intact":
        return read_sealed(path, key) is not None if is_json else parquet_key(path) == key
    stored = None if is_json else parquet_key(path)
    if state == "damaged" or stored in (None, key):
        set_aside(path, report)
    return False


def kept_json(path: Path, key: str, report: Report) -> dict[str, Any] | None:
    """The object of `write_sealed` under `key`; None if it is absent or outdated. A damaged file is set aside."""
    return read_sealed(path, key) if is_kept(path, key, report) else None


def write_stamp(folder: Path, value: Mapping[str, Any], name: str = MODEL_STAMP) -> None:
    """Writes the stamp of a folder: `value` and `files`, the digest of each file in it and in its folders by path.

    The files reach the disk before the stamp does. Hidden and temporary files are left out.

    Args:
        value: has the `key` of the artifact.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not _is_hidden(path.relative_to(folder)))
    files = [path for path in files if path != folder / name]
    for path in (*files, *{path.parent for path in files}):
        fsync(path)
    digests = dict(zip([str(path.relative_to(folder)) for path in files], _digests(files), strict=True))
    write_sealed(folder / name, {**value, "files": digests}, str(value["key"]))


def read_stamp(folder: Path, name: str = MODEL_STAMP) -> dict[str, Any] | None:
    """The value of an intact stamp, with `files`; None if there is none. The files are not read."""
    stamp = read_sealed(folder / name)
    files = {} if stamp is None else stamp.get("files", {})
    is_sound = isinstance(files, dict) and all(isinstance(digest, str) for digest in files.values())
    return stamp if is_sound else None


def damaged_in(folder: Path, name: str = MODEL_STAMP) -> list[Path]:
    """The files of a stamped folder that are missing or not as they were written; the stamp itself if that is one.

    It reads all files. One that was removed to free its space (storage/removed.py) is not missing.

    Raises:
        OSError: one is there and may not be read, which is no damage.
    """
    stamp = read_stamp(folder, name)
    if stamp is None:
        return [folder / name]
    files = {folder / path: digest for path, digest in stamp.get("files", {}).items()}
    found = _digests(list(files))
    removed = removed_in(folder)
    gone = set() if removed is None else {folder / path for path in removed.files}
    return [
        path
        for (path, digest), actual in zip(files.items(), found, strict=True)
        if digest != actual and not (actual is None and path in gone)
    ]


def check_intact(paths: Iterable[Path | None]) -> None:
    """Checks artifacts that a stage is about to read. Files and folders without a digest (a user's own) pass unread.

    Raises:
        DamagedError: one is not as it was written.
        RemovedError: one was removed to free its space.
    """
    for path in paths:
        if path is None:
            continue
        check_not_removed(path)
        damaged: list[Path] = []
        if path.is_dir():
            damaged = damaged_in(path) if (path / MODEL_STAMP).exists() else []
        elif file_state(path) == "damaged":
            damaged = [path]
        if damaged:
            raise DamagedError(
                f"{damaged[0]} is damaged: it is not as it was written (its digest differs). Remove it and make it "
                "again, or restore it from a copy. If another program wrote it from one of ours, write it without the "
                "file's metadata (pyarrow: table.replace_schema_metadata(None))"
            )


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") or part.endswith(TEMPORARY) for part in path.parts)


def _digests(files: list[Path]) -> list[str | None]:
    def digest(path: Path) -> str | None:
        try:
            return content_digest(path)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    with ThreadPoolExecutor(_READERS) as readers:
        return list(readers.map(digest, files))
