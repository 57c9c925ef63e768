"""What lies between stages: schemas, atomic writes, keys and the manifest.

Every file is written to a temporary name in its own folder, fsynced, renamed, and only then named in the
manifest; so a file under its final name is whole, whatever happened. A Parquet shard carries its key in its
footer: a resume trusts the footer, never the clock.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dice_py.errors import DataError, DiceError, DiskFullError, UsageError

TEMPORARY = ".tmp"  # how the hidden names end under which files are written
_PATH_ERRORS = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_disk_full(error: BaseException | None) -> bool:
    """True when `error`, or one that it was raised from, says that there is no room left on the disk.

    Libraries that write through other languages say it only in their text.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def path_error(error: OSError) -> DiceError | None:
    """The sentence for a path that cannot be written or read, which the user can mend; None for the rest."""
    place = error.filename2 or error.filename
    if is_disk_full(error):
        return DiskFullError(f"no room left on the disk ({error}); free some space, then go on")
    if error.errno in _PATH_ERRORS and place is not None:
        return UsageError(f"{place}: {error.strerror}; check the path and who may write there")
    return None


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; on leaving without an error it is fsynced and takes its place.

    Works for a file and for a folder (every file in it is fsynced). On any error the temporary is removed
    and `path` is left as it was.

    Raises:
        DiskFullError: the disk has no room (ENOSPC or EDQUOT), naming the path and what to do.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        yield temporary
        for part in (*temporary.rglob("*"), temporary):
            _fsync(part)
        if temporary.is_dir() and path.is_dir():
            # A folder cannot be renamed over a full one. The old one goes first: it is only ever replaced
            # because its key no longer holds.
            shutil.rmtree(path)
        temporary.rename(path)
        _fsync(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            _remove(temporary)
        if is_disk_full(error) and not isinstance(error, DiskFullError):
            raise DiskFullError(
                f"no room left on the disk while writing {path}; nothing that was whole is lost. "
                "Free some space, then `dice resume` the run (or call the stage again)"
            ) from error
        raise


def remove_temporaries(folder: Path) -> None:
    """Removes what a killed process was writing under `folder`. Only for a caller who holds its lock."""
    for left in sorted(folder.rglob(f".*{TEMPORARY}"), reverse=True):
        _remove(left)


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
    """Writes JSON atomically; NaN and infinities are refused, since JSON has no word for them."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads JSON that this program wrote.

    Raises:
        DataError: absent or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None


class Manifest:
    """`manifest.json`: per round and stage its key, files, counts and seconds. One process writes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = {"version": 1, "created": time.time(), "stages": {}}
        if path.exists():
            self.data = read_json(path)

    def stage(self, name: str) -> dict[str, Any] | None:
        """The entry of a stage such as `round-01/mine`."""
        entry: dict[str, Any] | None = self.data["stages"].get(name)
        return entry

    def record(self, name: str, **fields: Any) -> None:
        """Updates a stage's entry and writes the manifest."""
        self.data["stages"].setdefault(name, {}).update(fields)
        self.save()

    def save(self) -> None:
        """Writes the manifest as it is."""
        write_json(self.path, self.data)
