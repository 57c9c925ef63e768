"""Scored responses in Parquet: one file, several, a glob pattern, or a folder (Hive-partitioned or plain).

Their rows count through all files in one order: that of the arguments, and by path inside a pattern or folder. Only the
columns that are asked for are read, one batch after another.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from dice_py.errors import DataError
from dice_py.mining.columns import refuse_foreign

BATCH_ROWS = 1 << 18


@dataclass(frozen=True)
class _Fragment:
    file: str
    fragment: ds.Fragment
    partition: dict[str, object]
    """Columns that the names of folders give."""
    rows: int


class ScoredFiles:
    """The rows of some Parquet files.

    Raises:
        DataError: there is no such file, or one is not Parquet.
    """

    def __init__(self, scored: list[str]) -> None:
        self._fragments: list[_Fragment] = []
        fields: dict[str, pa.Field[Any]] = {}
        for dataset in (_dataset(argument) for argument in scored):
            for fragment in sorted(dataset.get_fragments(), key=lambda one: str(one.path)):
                partition = ds.get_partition_keys(fragment.partition_expression)
                try:
                    rows, schema = fragment.count_rows(), fragment.physical_schema
                except (pa.ArrowException, OSError) as error:
                    raise DataError(f"{fragment.path} cannot be read as Parquet: {error}") from None
                self._fragments.append(_Fragment(fragment.path, fragment, partition, rows))
                for field in schema:
                    fields.setdefault(field.name, field)
                for name in partition:
                    fields.setdefault(name, dataset.schema.field(name))
        self.files = [one.file for one in self._fragments]
        self.rows = sum(one.rows for one in self._fragments)
        self.schema = pa.schema(fields.values())

    def batches(self, columns: list[str], batch_rows: int = BATCH_ROWS) -> Iterator[pa.RecordBatch]:
        """The named columns, in order of rows.

        Raises:
            DataError: a file lacks one of them, or has it in another type.
        """
        schema = pa.schema([self.schema.field(name) for name in columns])
        for field in schema:
            refuse_foreign(field.name, field.type)
        for one in self._fragments:
            physical = one.fragment.physical_schema
            missing = [name for name in columns if name not in physical.names and name not in one.partition]
            if missing:
                raise DataError(f"{one.file} has no column '{missing[0]}'; its columns are {', '.join(physical.names)}")
            for field in schema:
                found = physical.field(field.name).type if field.name in physical.names else field.type
                # Text has several types that mean the same; a number that is cast may be another one.
                if found != field.type and (_number(found) or _number(field.type)):
                    raise DataError(
                        f"{one.file} has column '{field.name}' as {found}, but {self._fragments[0].file} as "
                        f"{field.type}: cast one of them"
                    )
            try:
                # Little is read ahead, and what was read is not kept: memory is what this is for.
                yield from one.fragment.to_batches(
                    schema=schema,
                    columns=columns,
                    batch_size=batch_rows,
                    batch_readahead=1,
                    fragment_readahead=1,
                    fragment_scan_options=ds.ParquetFragmentScanOptions(pre_buffer=False),
                )
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{one.file} cannot be read: {error}") from None


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
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{argument} cannot be read as Parquet: {error}") from None
    if not files:
        raise DataError(f"{argument} does not exist (or is not a file), and no file matches it as a pattern")
    try:
        return ds.dataset(files, format="parquet")
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{argument} cannot be read as Parquet: {error}") from None


def _number(dtype: pa.DataType) -> bool:
    return pa.types.is_integer(dtype) or pa.types.is_floating(dtype) or pa.types.is_decimal(dtype)


def _hidden(path: Path) -> bool:
    """What a writer left unfinished, and what Spark calls metadata."""
    return any(part.startswith((".", "_")) for part in path.parts)
