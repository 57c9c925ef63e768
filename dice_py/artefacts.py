"""What lies between stages: schemas, atomic writes, keys and the manifest.

Every file is written to a temporary name in its own folder, fsynced, renamed, and only then named in the
manifest; so a file under its final name is whole, whatever happened. A Parquet shard carries its key in its
footer: a resume trusts the footer, never the clock.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from dice_py.errors import DataError, DiceError, UsageError

MESSAGES = pl.List(pl.Struct({"role": pl.String, "content": pl.String}))


def _schema(**columns: pl.DataType | type[pl.DataType]) -> pl.Schema:
    return pl.Schema(columns)


PROMPTS = _schema(prompt_id=pl.UInt32, messages=MESSAGES)

GENERATIONS = _schema(
    prompt_id=pl.UInt32,
    sample_id=pl.UInt16,
    prompt_token_ids=pl.List(pl.Int32),
    token_ids=pl.List(pl.Int32),
    response=pl.String,
    response_tokens=pl.UInt32,
    response_chars=pl.UInt32,
    finish_reason=pl.String,
    # Σ log π(y_t|…) as the engine that sampled saw it: raw, before temperature and top-p.
    sampled_logp=pl.Float32,
)

SCORES = _schema(logp=pl.Float32, ref_logp=pl.Float32, reward=pl.Float32)

MINED = _schema(
    prompt_id=pl.UInt32,
    chosen_row=pl.UInt64,
    rejected_row=pl.UInt64,
    chosen_reward=pl.Float32,
    rejected_reward=pl.Float32,
    margin=pl.Float32,
    chosen_length=pl.UInt32,
    rejected_length=pl.UInt32,
)

# What mining adds to the columns of `MINED` where it is asked for (the policy is the round that sampled).
MINED_LABELS = _schema(
    chosen_win_rate=pl.Float32,
    rejected_win_rate=pl.Float32,
    soft_label=pl.Float32,
    difficulty=pl.String,
    consistency=pl.Float32,
    chosen_policy=pl.UInt32,
    rejected_policy=pl.UInt32,
)

PAIRS = _schema(
    prompt=MESSAGES,
    chosen=MESSAGES,
    rejected=MESSAGES,
    prompt_ids=pl.List(pl.Int32),
    chosen_ids=pl.List(pl.Int32),
    rejected_ids=pl.List(pl.Int32),
)

TRAINING_SET = _schema(
    **PAIRS,
    ref_chosen_logps=pl.Float32,
    ref_rejected_logps=pl.Float32,
    source=pl.String,
)

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
_KEY, _META = "dice.key", "dice.meta"  # names in a Parquet footer


class DiskFullError(DiceError):
    """No room left: nothing that was whole is lost, and a resume goes on from it (exit code 5)."""

    exit_code = 5


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


def write_parquet(
    path: Path, frame: pl.DataFrame, *, key: str, schema: pl.Schema | None = None, meta: Any = None
) -> Path:
    """Writes `frame`, cast to `schema` where one is given, with `key` (and `meta` as JSON) in the footer."""
    if schema is not None:
        frame = frame.select(schema.names()).cast(dict(schema))  # type: ignore[arg-type]
    table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
    footer = {_KEY: key, _META: json.dumps(meta)}
    # Without the Arrow schema, which would say large_string and large_list as Polars holds them, a reader of
    # any kind gets the plain types.
    with (
        atomic(path) as temporary,
        pq.ParquetWriter(temporary, table.schema, compression="zstd", store_schema=False) as writer,
    ):
        writer.write_table(table)
        writer.add_key_value_metadata(footer)
    return path


class ParquetStream:
    """A Parquet file written in parts, as `write_parquet` writes one; not atomic by itself.

    A context manager: the file is whole when it is left. Without any part, nothing is written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> ParquetStream:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def write(self, frame: pl.DataFrame) -> None:
        """Appends rows; all parts have the columns of the first."""
        self.write_arrow(frame.to_arrow(compat_level=pl.CompatLevel.oldest()))

    def write_arrow(self, table: pa.Table) -> None:
        """Appends rows; all parts have the columns of the first."""
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, table.schema, compression="zstd", store_schema=False)
        self._writer.write_table(table)

    def describe(self, key: str, meta: Any) -> None:
        """Sets what `parquet_key` and `parquet_meta` read."""
        if self._writer is not None:
            self._writer.add_key_value_metadata({_KEY: key, _META: json.dumps(meta)})


def _footer(path: Path, name: str) -> str | None:
    try:
        found = (pq.read_metadata(path).metadata or {}).get(name.encode())
    except (OSError, pa.ArrowException):
        return None
    return found.decode() if found is not None else None


def parquet_key(path: Path) -> str | None:
    """The key in the footer of `path`; None where the file is absent, broken, or not ours."""
    return _footer(path, _KEY)


def parquet_rows(path: Path) -> int:
    """Rows of a Parquet file, from its footer.

    Raises:
        DataError: absent or unreadable.
    """
    try:
        return int(pq.read_metadata(path).num_rows)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet: {str(error).strip()}") from None


def parquet_meta(path: Path) -> Any:
    """What `write_parquet` was given as `meta`."""
    return json.loads(_footer(path, _META) or "null")


def read_parquet(path: Path, columns: list[str] | None = None) -> pl.DataFrame:
    """Reads one Parquet file.

    Raises:
        DataError: absent, unreadable, or lacking one of `columns`.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist")
    try:
        lazy = pl.scan_parquet(path, glob=False)
        present = lazy.collect_schema().names()
        missing = [name for name in columns or [] if name not in present]
        if missing:
            raise DataError(f"{path}: no column {missing[0]!r}; its columns are {', '.join(present)}")
        return (lazy.select(columns) if columns else lazy).collect()
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{path} cannot be read as Parquet: {str(error).strip()}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def digest(*parts: Any) -> str:
    """A key: SHA-256 over the parts as canonical JSON, 24 hexadecimal digits of it."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def seed_for(*parts: int | str) -> int:
    """A seed below 2^63 from (run seed, round, prompt_id, sample_id, …): any layout, any retry, one seed."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


@cache
def versions(*packages: str) -> dict[str, str]:
    """Installed versions of `packages`, ours always among them; absent ones are left out."""
    found = {}
    for name in ("dice-align", *packages):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@cache
def _file_digest(path: str, size: int, mtime_ns: int) -> str:
    del size, mtime_ns  # a changed file must not meet the old entry of the cache
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:24]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, 24 digits of it.

    Raises:
        DataError: absent or unreadable.
    """
    try:
        stat = path.stat()
        return _file_digest(str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


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


Report = Callable[..., None]
"""How a stage tells what it does: `report(event, **fields)`; see dice_py/worker.py for the events."""


def no_report(event: str, **fields: Any) -> None:
    """A `Report` for callers that do not listen."""
