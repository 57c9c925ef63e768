"""Scored responses in Parquet: one file, several, a glob pattern, or a folder (Hive-partitioned or plain).

Row numbers count through all files: in the order of the arguments, and by path inside a pattern or folder. Only the
requested columns are read, batch by batch.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from dice_py.config.mining import MiningOptions
from dice_py.errors import DataError, DiceError, OutOfMemoryError
from dice_py.mining.columns import CHARACTERS, arrow_frame, hash_duplicates, refuse_twice, wanted_columns
from dice_py.rows.file_kinds import is_url, other_format
from dice_py.storage.parquet import UNREADABLE, complete_batches, refuse_foreign

BATCH_ROWS = 1 << 18
"""Rows of a batch, at most."""


@dataclass(frozen=True)
class _Fragment:
    file: str
    fragment: ds.Fragment
    partition: dict[str, object]
    """Columns from the names of Hive folders (`round=1/`), each with the value of this file."""
    rows: int


class ScoredFiles:
    """The Parquet files that some arguments name, read as one table.

    Args:
        scored: files, glob patterns, or folders.

    Raises:
        DataError: an argument names no file, or a file is not Parquet.
    """

    def __init__(self, scored: list[str]) -> None:
        self._fragments: list[_Fragment] = []
        fields: dict[str, pa.Field[Any]] = {}
        for dataset in (_dataset(argument) for argument in scored):
            for fragment in sorted(dataset.get_fragments(), key=lambda fragment: str(fragment.path)):
                partition = ds.get_partition_keys(fragment.partition_expression)
                try:
                    rows, schema = fragment.count_rows(), fragment.physical_schema
                    columns = [*schema, *(dataset.schema.field(name) for name in partition if name not in schema.names)]
                    for field in columns:
                        known = fields.get(field.name)
                        # A column without any value in one file has no type there.
                        if known is None or pa.types.is_null(known.type):
                            fields[field.name] = field
                except UNREADABLE as error:
                    raise _unreadable(fragment.path, error) from None
                self._fragments.append(_Fragment(fragment.path, fragment, partition, rows))
        self.files = [fragment.file for fragment in self._fragments]
        self.rows = sum(fragment.rows for fragment in self._fragments)
        self.schema = pa.schema(fields.values())

    def all_have(self, column: str) -> bool:
        """Whether every file has a column."""
        return all(
            column in part.fragment.physical_schema.names or column in part.partition for part in self._fragments
        )

    def batches(self, columns: list[str], batch_rows: int = BATCH_ROWS) -> Iterator[pa.RecordBatch]:
        """Batches of the named columns, in the order of the row numbers.

        Args:
            batch_rows: rows of a batch, at most.

        Raises:
            DataError: a file lacks one of them, or has it in another type.
        """
        schema = pa.schema([self.schema.field(name) for name in columns])
        for field in schema:
            refuse_foreign(field.name, field.type)
        for part in self._fragments:
            physical = part.fragment.physical_schema
            missing = [name for name in columns if name not in physical.names and name not in part.partition]
            if missing:
                remedy = "; mine such files alone, or keep cut-off responses (truncated_column=None/none)"
                raise DataError(
                    f"{part.file} has no column '{missing[0]}'; its columns are {', '.join(physical.names)}"
                    + (remedy if missing[0] == "finish_reason" else "")
                )
            refuse_twice(physical.names, columns, part.file)
            for field in schema:
                dtype = physical.field(field.name).type if field.name in physical.names else field.type
                # The Arrow types of text are interchangeable. Casting a number could change its value.
                is_other = dtype != field.type and not pa.types.is_null(dtype)
                if is_other and (_is_number(dtype) or _is_number(field.type)):
                    raise DataError(
                        f"{part.file} has column '{field.name}' as {dtype}, but {self._fragments[0].file} as "
                        f"{field.type}: cast one of them"
                    )
            try:
                yield from _one_ahead(_read(part, schema, batch_rows))
            except UNREADABLE as error:
                if isinstance(error, MemoryError):  # pyarrow's is an ArrowException too
                    raise _no_memory(part.file) from None
                raise DataError(f"{part.file} cannot be read: {error}") from None


def _read(part: _Fragment, schema: pa.Schema, batch_rows: int) -> Iterator[pa.RecordBatch]:
    """The batches of one file, with columns and types of `schema`.

    Not by the scanner of the data set: whatever it is told, it reads up to 1 GiB ahead of who takes the batches.
    """
    names = [name for name in schema.names if name not in part.partition]
    with pq.ParquetFile(Path(part.file).absolute(), pre_buffer=False) as file:
        for batch in complete_batches(file, batch_rows, names):
            columns = [
                pa.repeat(pa.scalar(part.partition[field.name], field.type), batch.num_rows)
                if field.name in part.partition
                else batch.column(field.name).cast(field.type)
                for field in schema
            ]
            complete = pa.RecordBatch.from_arrays(columns, schema=schema)
            complete.validate(full=True)  # text that is not UTF-8
            yield complete


def _one_ahead(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same, each read while the one before it is in use."""
    with ThreadPoolExecutor(1) as reader:
        pending = reader.submit(next, batches, None)
        while (batch := pending.result()) is not None:
            pending = reader.submit(next, batches, None)
            yield batch


def columns_to_read(files: ScoredFiles, *options: MiningOptions) -> list[str]:
    """`wanted_columns` of files. A `response_chars` that only some of them have is left out.

    Raises:
        DataError: a column is missing.
    """
    columns = wanted_columns(files.schema.names, *options)
    named = {name for one in options for name in one.columns.values()}
    if CHARACTERS in columns and CHARACTERS not in named and not files.all_have(CHARACTERS):
        columns.remove(CHARACTERS)
    return columns


def narrow_batches(files: ScoredFiles, columns: list[str], *options: MiningOptions) -> Iterator[pl.DataFrame]:
    """Batches of the named columns, in order of rows, with text and token ids of duplicate columns hashed."""
    for i, batch in enumerate(files.batches(columns)):
        if i % 16 == 0:
            # Arrow's pool would keep the memory of decoded pages.
            pa.default_memory_pool().release_unused()
        if batch.num_rows:
            yield hash_duplicates(arrow_frame(pa.Table.from_batches([batch])), *options)


def _dataset(argument: str) -> ds.Dataset:
    path = Path(argument)
    try:
        if path.is_dir():
            files = sorted(str(file) for file in path.rglob("*.parquet") if not _hidden(file.relative_to(path)))
            if not files:
                raise DataError(f"{argument} holds no *.parquet file")
            return ds.dataset(files, format="parquet", partitioning="hive", partition_base_dir=str(path))
        if path.is_file():
            return ds.dataset([argument], format="parquet")
        files = sorted(file for file in glob.glob(argument, recursive=True) if Path(file).is_file())  # noqa: PTH207 (patterns may be absolute)
    except UNREADABLE as error:
        raise _unreadable(argument, error) from None
    if not files:
        why = (
            "is no regular file"
            if path.exists()
            else "does not exist (or is not a file), and no file matches it as a pattern"
        )
        remedy = "; only local files are read: get it first" if is_url(argument) else ""
        raise DataError(f"{argument} {why}{remedy}")
    try:
        return ds.dataset(files, format="parquet")
    except UNREADABLE as error:
        raise _unreadable(argument, error) from None


def _no_memory(file: str) -> OutOfMemoryError:
    return OutOfMemoryError(f"{file}: there is not enough memory to read it; lower --memory, or raise the limit")


def _unreadable(file: str, error: BaseException) -> DiceError:
    if isinstance(error, MemoryError):
        return _no_memory(file)
    what = other_format(Path(file)) if Path(file).is_file() else None
    if what is not None:
        return DataError(f"{file} {what}")
    is_other = "magic bytes not found" in str(error) or "smaller than the minimum" in str(error)
    remedy = "; dice mine reads Parquet: convert it" if is_other else ""
    return DataError(f"{file} cannot be read as Parquet: {error}{remedy}")


def _is_number(dtype: pa.DataType) -> bool:
    return pa.types.is_integer(dtype) or pa.types.is_floating(dtype) or pa.types.is_decimal(dtype)


def _hidden(path: Path) -> bool:
    """Whether a path is an unfinished file of a writer, or Spark's metadata."""
    return any(part.startswith((".", "_")) for part in path.parts)
