"""Parquet files with a key in the footer: written atomically, read with errors that name the file.

A resume decides by the key whether a file is still valid, never by its time of modification.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from dice_py.errors import DataError
from dice_py.storage.files import atomic
from dice_py.storage.schemas import fit

_KEY, _META = "dice.key", "dice.meta"  # names in a Parquet footer


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
    footer = {_KEY: key, _META: json.dumps(meta)}
    # The Arrow schema would declare Polars' large_string and large_list; without it, any reader gets the plain types.
    with (
        atomic(path) as temporary,
        pq.ParquetWriter(temporary, table.schema, compression="zstd", store_schema=False) as writer,
    ):
        writer.write_table(table)
        writer.add_key_value_metadata(footer)
    return path


class ParquetStream:
    """Writes a Parquet file in parts, in the format of `write_parquet`, but not atomically.

    A context manager: on exit the file is complete. Without any part, no file is written.
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
        """Sets the key and the metadata in the footer, as `write_parquet` does. Without any part it does nothing."""
        if self._writer is not None:
            self._writer.add_key_value_metadata({_KEY: key, _META: json.dumps(meta)})


def _footer(path: Path, name: str) -> str | None:
    try:
        value = (pq.read_metadata(path).metadata or {}).get(name.encode())
    except (OSError, pa.ArrowException):
        return None
    return value.decode() if value is not None else None


def parquet_key(path: Path) -> str | None:
    """The key in the footer of `path`; None if the file is absent, damaged, or without a key."""
    return _footer(path, _KEY)


def parquet_rows(path: Path) -> int:
    """Number of rows of a Parquet file, from its footer.

    Raises:
        DataError: the file is absent or cannot be read.
    """
    try:
        return int(pq.read_metadata(path).num_rows)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet: {str(error).strip()}") from None


def parquet_meta(path: Path) -> Any:
    """The `meta` value in the footer of `path`; None if there is none."""
    return json.loads(_footer(path, _META) or "null")


def read_parquet(path: Path, columns: list[str] | None = None) -> pl.DataFrame:
    """Reads one Parquet file: all columns, or only `columns`.

    Raises:
        DataError: the file is absent, cannot be read, or lacks one of `columns`.
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
