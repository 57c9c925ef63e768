"""Parquet files with a key in the footer: written atomically, read with errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from dice_py.errors import DataError
from dice_py.storage.files import atomic

_KEY, _META = "dice.key", "dice.meta"  # names in a Parquet footer


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
