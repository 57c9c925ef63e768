"""Atomic writes, JSON, and the manifest of a run.

Every file is written under a temporary name in its own folder, fsynced, renamed, and only then listed in the manifest.
So a file under its final name is complete, even after a crash. Parquet files are in storage/parquet.py.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dice_py.errors import DataError, DiceError, DiskFullError, UsageError
from dice_py.storage.digests import DIGEST_NAME, NO_DIGEST, embed_digest, file_state

TEMPORARY = ".tmp"
"""Suffix of the hidden names under which files are written."""

KEY_NAME = "dice.key"
"""The name of an artifact's key inside its file."""

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space, no quota, and more than the file system or `ulimit -f` allows for one file."""
_TORCH_SAVE = ("PytorchStreamWriter failed writing", "unexpected pos ")
_PATH_ERRORS = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENXIO,
)


def make_folder(folder: Path) -> None:
    """Makes a folder, and those above it.

    Raises:
        UsageError: the system makes no folders there (as under /proc).
        OSError: for another reason, which `path_error` knows.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if path_error(error) is not None:
            raise
        raise UsageError(f"{folder}: no folder can be made there ({error.strerror}); choose another place") from None


def fsync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_disk_full(error: BaseException | None) -> bool:
    """True if `error`, or an error that caused it, means that the disk or the quota is full.

    Libraries written in other languages report it only in the message. torch.save says no more than how far its
    writer came, which has no other cause in practice than a disk that took less than it was given.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            return True
        text = str(error)
        if any(os.strerror(number) in text for number in _DISK_FULL):
            return True
        if isinstance(error, RuntimeError) and any(phrase in text for phrase in _TORCH_SAVE):
            return True
        error = error.__cause__ or error.__context__
    return False


def _no_room(error: BaseException) -> str:
    too_large = os.strerror(errno.EFBIG) in str(error)
    return (
        "a file may not grow so large here (ulimit -f, or the file system)" if too_large else "no room left on the disk"
    )


def path_error(error: OSError) -> DiceError | None:
    """The error to show for a path that the user can fix (permissions, a full disk, …); None for other errors."""
    path = error.filename2 or error.filename
    if is_disk_full(error):
        return DiskFullError(f"{_no_room(error)} ({error}); free some space, then run the command again")
    if error.errno in (errno.EIO, errno.ESTALE):
        where = f"{path}: " if path is not None else ""
        return DataError(f"{where}{error.strerror}: a disk or a network folder fails; check it, then start again")
    if error.errno in _PATH_ERRORS and path is not None:
        return UsageError(f"{path}: {error.strerror}; check the path and its permissions")
    return None


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; after a block without an error, it is fsynced and renamed to `path`.

    Works for files and for folders, in which every file is fsynced. On an error the temporary path is removed and
    `path` is unchanged.

    Raises:
        DiskFullError: the disk or the quota is full, or files may not be so large; the message names the path.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        make_folder(path.parent)
        _remove(temporary)
        yield temporary
        for part in (*temporary.rglob("*"), temporary):
            fsync(part)
        if path.is_dir() and not temporary.is_dir():
            raise UsageError(f"{path} is a folder, where a file belongs: move it away, then run the command again")
        if temporary.is_dir() and path.is_dir():
            # A folder cannot be renamed over one that has files. The old one is removed first, which loses nothing:
            # a folder is replaced only after its key has become outdated.
            shutil.rmtree(path)
        temporary.rename(path)
        fsync(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            _remove(temporary)
        if is_disk_full(error) and not isinstance(error, DiskFullError):
            raise DiskFullError(
                f"{_no_room(error)} while writing {path}; completed files are kept. "
                "Free some space, then `dice resume` the run (or run the stage again)"
            ) from error
        raise


def remove_temporaries(folder: Path, name: str = "") -> None:
    """Removes the temporary files that a killed process left under `folder`. The caller must hold its lock.

    Args:
        name: begins the names of the files or folders that they were to become; those of others are left.
    """
    for temporary in sorted(folder.rglob(f".{name}*{TEMPORARY}"), reverse=True):
        _remove(temporary)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Removes the temporary files and folders that killed processes left in a folder, which others may be using.

    Args:
        folder: what lies in folders inside of it is left.
        name: of the file that they were to become; None: of any.
    """
    stem = r".+\.(\d{1,7})" if name is None else re.escape(name) + r"\.(\d+)(?:\.\w+)?"
    leftover = re.compile(rf"\.{stem}{re.escape(TEMPORARY)}")
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        found = leftover.fullmatch(path.name)
        if found is not None and not _process_exists(int(found[1])):
            _remove(path)


def _process_exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically.

    Raises:
        ValueError: a value is NaN or infinite, which JSON cannot express.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file that this program wrote, without the key and the digest of `write_sealed`.

    Raises:
        DataError: the file is absent or is not JSON.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return _unsealed(value) if isinstance(value, dict) else value
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:  # ValueError: of its text, its syntax, or an integer's digits
        raise DataError(f"{path} is not valid JSON: {error}") from None


def write_sealed(path: Path, value: dict[str, Any], key: str) -> None:
    """Writes a JSON object atomically, with `key` and its digest of itself (storage/digests.py) as its last members.

    Raises:
        ValueError: a value is NaN or infinite, which JSON cannot express.
    """
    sealed = {**value, KEY_NAME: key, DIGEST_NAME: NO_DIGEST}
    text = json.dumps(sealed, indent=2, allow_nan=False) + "\n"
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
        embed_digest(temporary)


def write_sealed_text(path: Path, text: str, comment: str) -> None:
    """Writes UTF-8 text atomically, and below it a comment with its digest of itself.

    Args:
        comment: a line of the file's own syntax, with "{}" for the digest ("# {}").
    """
    with atomic(path) as temporary:
        temporary.write_text(text + comment.format(f"{DIGEST_NAME}: {NO_DIGEST}") + "\n", encoding="utf-8")
        embed_digest(temporary)


def read_sealed(path: Path, key: str | None = None) -> dict[str, Any] | None:
    """The object that `write_sealed` wrote, under `key` if one is given; None if the file is absent or damaged."""
    try:
        if file_state(path) != "intact":
            return None
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or (key is not None and value.get(KEY_NAME) != key):
        return None
    return _unsealed(value)


def _unsealed(value: dict[str, Any]) -> dict[str, Any]:
    return {name: item for name, item in value.items() if name not in (KEY_NAME, DIGEST_NAME)}


def _is_manifest(value: dict[str, Any]) -> bool:
    """Whether the stages of a manifest, and the files that they list, are of the types that `Manifest` writes."""

    def is_file(item: Any) -> bool:
        return isinstance(item, dict) and _is_inside(item.get("file")) and isinstance(item.get("key"), str)

    def is_stage(entry: Any) -> bool:
        if not isinstance(entry, dict) or not isinstance(entry.get("counts", {}), dict):
            return False
        files, seconds = entry.get("files", []), entry.get("seconds")
        has_seconds = seconds is None or isinstance(seconds, int | float)
        return has_seconds and isinstance(files, list) and all(map(is_file, files))

    stages, others = value.get("stages"), value.get("others", {})
    has_stages = isinstance(stages, dict) and all(map(is_stage, stages.values()))
    return has_stages and isinstance(others, dict) and all(map(_is_inside, others))


def _is_inside(name: Any) -> bool:
    """Whether a manifest names a file of its own folder: what is damaged of a stage is renamed, and none elsewhere."""
    return isinstance(name, str) and "\0" not in name and not Path(name).is_absolute() and ".." not in Path(name).parts


class Manifest:
    """`manifest.json`: key, files, counts and seconds of each stage of each round. One process writes it.

    It carries its digest of itself. A damaged one reads as an empty one (`is_damaged`): the stages find their files by
    the keys and digests that these carry.

    Raises:
        OSError: it is there and may not be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = {"version": 1, "created": time.time(), "stages": {}}
        if path.is_file():
            path.open("rb").close()  # what may not be read is not damaged, and must not be set aside
        stored = read_sealed(path, "manifest") or self._of_older_version()
        if stored is not None and not _is_manifest(stored):
            stored = None
        self.is_damaged = stored is None and os.path.lexists(path)
        if stored is not None:
            self.data = stored

    def _of_older_version(self) -> dict[str, Any] | None:
        """The content of a manifest without a digest, as version 0.3 wrote it."""
        if not self.path.is_file():  # a pipe would wait for a writer, and a device has no end
            return None
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        is_older = isinstance(stored, dict) and isinstance(stored.get("stages"), dict) and KEY_NAME not in stored
        return stored if is_older else None

    def stage(self, name: str) -> dict[str, Any] | None:
        """The entry of a stage such as "round-01/mine"; None before it is first recorded."""
        entry: dict[str, Any] | None = self.data["stages"].get(name)
        return entry

    def record(self, name: str, **fields: Any) -> None:
        """Updates a stage's entry and writes the manifest."""
        self.data["stages"].setdefault(name, {}).update(fields)
        self.save()

    def save(self) -> None:
        """Writes the manifest in its current state."""
        write_sealed(self.path, self.data, "manifest")
