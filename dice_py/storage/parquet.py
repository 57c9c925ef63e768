"""Parquet files with a key and a digest in the footer: written atomically, read with errors that name the file.

A resume decides by the key whether a file is still valid, never by its time of modification, and by the digest of its
bytes (storage/digests.py) whether it is as it was written.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from dice_py.errors import DataError, OutOfMemoryError
from dice_py.storage.digests import DIGEST_NAME, NO_DIGEST, embed_digest, file_state
from dice_py.storage.encodings import writer_options
from dice_py.storage.files import KEY_NAME, atomic
from dice_py.storage.removed import check_not_removed
from dice_py.storage.schemas import fit

UNREADABLE = (OSError, pa.ArrowException, UnicodeDecodeError, pl.exceptions.PolarsError, pl.exceptions.PanicException)
"""Errors of opening and reading a Parquet file of any content. (UnicodeDecodeError: the name of a column.)"""

# pyarrow gets absolute paths: it would expand a leading ~ of others, and take "s3:" for the scheme of a URL.
_META = "dice.meta"  # a name in a Parquet footer


def write_parquet(
    path: Path, frame: pl.DataFrame, *, key: str, schema: pl.Schema | None = None, meta: Any = None
) -> Path:
    """Writes a Parquet file atomically, zstd-compressed, and returns its path.

    Args:
        path: the file to write or replace.
        frame: the rows.
        key: what `parquet_key` returns later.
        schema: columns to select, and dtypes to cast them to (`fit`); None: `frame` unchanged.
        meta: JSON value that `parquet_meta` returns later.
    """
    if schema is not None:
        frame = fit(frame, schema)
    table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
    with atomic(path) as temporary:
        # The Arrow schema would declare Polars' large_string and large_list; without it, any reader gets plain types.
        options = writer_options(table.schema)
        with pq.ParquetWriter(temporary.absolute(), table.schema, store_schema=False, **options) as writer:
            writer.write_table(table)
            writer.add_key_value_metadata(_footer_of(key, meta))
        embed_digest(temporary)
    return path


def _footer_of(key: str, meta: Any) -> dict[str, str]:
    # The digest comes last: it is searched for near the end of the file.
    return {KEY_NAME: key, _META: json.dumps(meta), DIGEST_NAME: NO_DIGEST}


class ParquetStream:
    """Writes a Parquet file in parts, in the format of `write_parquet`, but not atomically.

    A context manager: on exit the file is complete. Without any part, no file is written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: pq.ParquetWriter | None = None
        self._is_described = False

    def __enter__(self) -> ParquetStream:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._writer.close()
            if self._is_described and error[0] is None:
                embed_digest(self._path)

    def write(self, frame: pl.DataFrame) -> None:
        """Appends rows; all parts have the columns of the first."""
        self.write_arrow(frame.to_arrow(compat_level=pl.CompatLevel.oldest()))

    def write_arrow(self, table: pa.Table) -> None:
        """Appends rows; all parts have the columns of the first."""
        if self._writer is None:
            path = self._path.absolute()
            options = writer_options(table.schema)
            self._writer = pq.ParquetWriter(path, table.schema, store_schema=False, **options)
        self._writer.write_table(table)

    def describe(self, key: str, meta: Any) -> None:
        """Sets the key and the metadata in the footer, as `write_parquet` does, and on exit the digest.

        Without any part it does nothing.
        """
        if self._writer is not None:
            self._writer.add_key_value_metadata(_footer_of(key, meta))
            self._is_described = True


def _footer(path: Path, name: str) -> str | None:
    try:
        value = (pq.read_metadata(path.absolute()).metadata or {}).get(name.encode())
        return value.decode() if value is not None else None
    except (OSError, pa.ArrowException, ValueError):  # ValueError: damaged text
        return None


def parquet_key(path: Path) -> str | None:
    """The key in the footer of `path`; None if the file is absent, unreadable, or without a key. It reads no rows."""
    return _footer(path, KEY_NAME)


def intact_key(path: Path) -> str | None:
    """The key of a Parquet file that is as it was written; None for any other. It reads all of the file.

    Raises:
        OSError: the file is there and cannot be read.
    """
    return parquet_key(path) if file_state(path) == "intact" else None


def parquet_rows(path: Path) -> int:
    """Number of rows of a Parquet file, from its footer.

    Raises:
        DataError: the file is absent or cannot be read.
    """
    try:
        return int(pq.read_metadata(path.absolute()).num_rows)
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read as Parquet: {str(error).strip()}") from None


def present(path: Path, *columns: str) -> list[str]:
    """Those of `columns` that a Parquet file has, from its footer.

    Raises:
        DataError: the file is absent or cannot be read.
    """
    try:
        names = pq.read_schema(path.absolute()).names
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read as Parquet: {str(error).strip()}") from None
    return [name for name in columns if name in names]


def parquet_meta(path: Path) -> Any:
    """The `meta` value in the footer of `path`; None if there is none."""
    try:
        return json.loads(_footer(path, _META) or "null")
    except (ValueError, RecursionError):  # damaged text
        return None


def refuse_foreign(name: str, dtype: pa.DataType) -> None:
    """Raises DataError for Arrow types that Polars does not support (some would make it panic)."""
    foreign = (
        pa.types.is_union(dtype)
        or pa.types.is_run_end_encoded(dtype)
        or pa.types.is_interval(dtype)
        or pa.types.is_decimal256(dtype)
    )
    if foreign:
        raise DataError(f"column '{name}' has the Arrow type {dtype}, which cannot be read: cast it first")
    if pa.types.is_dictionary(dtype):
        refuse_foreign(name, dtype.value_type)
    elif pa.types.is_nested(dtype):
        for i in range(dtype.num_fields):
            refuse_foreign(f"{name}.{dtype.field(i).name}", dtype.field(i).type)


def read_parquet(path: Path, columns: list[str] | None = None) -> pl.DataFrame:
    """Reads one Parquet file: all columns, or only `columns`.

    Raises:
        DataError: the file is absent, cannot be read, or lacks one of `columns`.
    """
    with opened_parquet(path, columns) as file:
        table = file.read(columns)
        _check_rows(file, table.num_rows)
        return table_frame(table if columns is None else table.select(columns))


def parquet_batches(path: Path, rows: int = 8192) -> Iterator[pl.DataFrame]:
    """The rows of a Parquet file, at most `rows` of them at a time.

    Raises:
        DataError: the file is absent or cannot be read.
    """
    with opened_parquet(path, None) as file:
        for batch in complete_batches(file, rows):
            yield table_frame(pa.Table.from_batches([batch]))


def complete_batches(file: pq.ParquetFile, rows: int, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The batches of a file, at most `rows` rows each. pyarrow alone would end early where a page is damaged.

    Raises:
        ArrowException: other errors of reading, or fewer or more rows than the footer names.
    """
    read = 0
    for batch in file.iter_batches(rows, columns=columns):
        read += batch.num_rows
        yield batch
    _check_rows(file, read)


def _check_rows(file: pq.ParquetFile, read: int) -> None:
    if read != file.metadata.num_rows:
        named = file.metadata.num_rows
        raise pa.ArrowInvalid(f"it is damaged: its footer names {named} rows, and {read} can be read; make it again")


@contextlib.contextmanager
def opened_parquet(path: Path, columns: list[str] | None) -> Iterator[pq.ParquetFile]:
    """An open file, whose errors of reading name it."""
    if not path.is_file():
        check_not_removed(path)
        raise DataError(f"{path} does not exist")
    # Not with Polars: a damaged file makes it panic, or end the process (an allocation of exbibytes).
    try:
        with pq.ParquetFile(path.absolute()) as file:
            present = file.schema_arrow.names
            missing = [name for name in columns or [] if name not in present]
            if missing:
                raise DataError(f"no column {missing[0]!r}; its columns are {', '.join(present)}")
            for field in file.schema_arrow:
                if columns is None or field.name in columns:
                    refuse_foreign(field.name, field.type)
            yield file
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except MemoryError:  # pyarrow's is an ArrowException too
        raise OutOfMemoryError(
            f"{path}: there is not enough memory to read it; free some, or raise the limit"
        ) from None
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read as Parquet: {str(error).strip()}") from None


def table_frame(table: pa.Table) -> pl.DataFrame:
    table.validate(full=True)  # text that is not UTF-8
    return pl.DataFrame(pl.from_arrow(table.replace_schema_metadata(None)))
