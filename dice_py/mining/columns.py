"""From a frame of any kind to the columns that the options name, in their own types (numeric.py makes numbers of them).

Only the columns that the options name are collected from a LazyFrame or
kept from an Arrow stream. Text is read only to compare responses (`duplicate_column`), and hashed batch by batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TypeAlias

import polars as pl

from dice_py.config.mining import MiningOptions
from dice_py.errors import DataError, UsageError
from dice_py.storage.parquet import refuse_foreign

if TYPE_CHECKING:
    import pyarrow as pa

CHARACTERS = "response_chars"
"""A column of `dice generate`. Where it is 0 the response is empty, though its stop token is one of its tokens."""


class ArrowStream(Protocol):
    """Anything with the Arrow PyCapsule interface: pandas, DuckDB, DataFusion, arro3, …"""

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object: ...


Frame: TypeAlias = "pl.DataFrame | pl.LazyFrame | pa.Table | pa.RecordBatchReader | ArrowStream"


def narrow_frame(frame: Frame, *options: MiningOptions) -> pl.DataFrame:
    """The columns that the options name, in their own types; text of the duplicate column as hashes.

    Args:
        options: of one mining, or of several that share the frame.

    Raises:
        UsageError: `frame` is not a table.
        DataError: a column is missing, or there are no rows.
    """
    lazy, names = _open(frame, *options)
    selected = lazy.select(wanted_columns(names, *options))
    hashed = _hashed(selected.collect_schema(), *options)
    # The streaming engine hashes text and token ids batch by batch, so that they are never all in memory.
    narrow = selected.with_columns(hashed).collect(engine="streaming") if hashed else selected.collect()
    if narrow.height == 0:
        raise DataError("the frame has no rows: pass a table with at least one response")
    return narrow


def wanted_columns(columns: list[str], *options: MiningOptions) -> list[str]:
    """The names of the columns to read, among all names of a table.

    Raises:
        DataError: a column is missing.
    """
    wanted: dict[str, None] = {}
    for one in options:
        for role, name in one.columns.items():
            if name not in columns:
                raise DataError(missing_column(name, columns, f"{role}_column=/--{role.replace('_', '-')}-column"))
        wanted |= dict.fromkeys(one.columns.values())
        if one.truncated_column == "auto":
            wanted |= {"finish_reason": None} if "finish_reason" in columns else {}
        elif one.truncated_column is not None:
            if one.truncated_column not in columns:
                raise DataError(missing_column(one.truncated_column, columns, "truncated_column="))
            wanted |= {one.truncated_column: None}
        if one.min_length and CHARACTERS in columns:
            wanted |= {CHARACTERS: None}
    refuse_twice(columns, list(wanted), "the frame")
    for name in wanted:
        # Polars would take the first for all columns, and the second for a pattern.
        if name in ("", "*") or (name.startswith("^") and name.endswith("$")):
            raise DataError(f"the column name {name!r} cannot be read: rename the column")
    return list(wanted)


def refuse_twice(columns: list[str], wanted: list[str], place: str) -> None:
    """Raises DataError if a table has a wanted column more than once."""
    for name in wanted:
        if columns.count(name) > 1:
            raise DataError(f"column '{name}' is {columns.count(name)} times in {place}: rename or drop the others")


def missing_column(name: str, columns: list[str], option: str) -> str:
    """The sentence about a missing column; `option` is the option that names it."""
    return f"column '{name}' not found in the frame; columns are {', '.join(columns)}; name it with {option}"


@contextmanager
def column_names(options: MiningOptions) -> Iterator[None]:
    """Adds the columns of the options to the extension's errors, which only know the roles."""
    try:
        yield
    except DataError as error:
        columns = ", ".join(f"{role} column '{name}'" for role, name in options.columns.items())
        raise DataError(f"{error} ({columns})") from None


def _open(frame: Frame, *options: MiningOptions) -> tuple[pl.LazyFrame, list[str]]:
    """The frame and the names of all its columns. From Arrow input only the wanted columns are kept."""
    if isinstance(frame, pl.LazyFrame):
        return frame, frame.collect_schema().names()
    if isinstance(frame, pl.DataFrame):
        return frame.lazy(), frame.columns
    import pyarrow as pa

    if isinstance(frame, pa.RecordBatch):
        frame = pa.Table.from_batches([frame])
    if isinstance(frame, pa.Table):
        reader = frame.to_reader()
    elif isinstance(frame, pa.RecordBatchReader):
        reader = frame
    elif hasattr(frame, "__arrow_c_stream__"):
        reader = pa.RecordBatchReader.from_stream(frame)
    else:
        raise UsageError(
            f"cannot mine a {type(frame).__name__}: pass a Polars DataFrame or LazyFrame, a pyarrow Table, "
            "or anything with __arrow_c_stream__"
        )
    names = reader.schema.names
    kept = wanted_columns(names, *options)
    schema = pa.schema([reader.schema.field(name) for name in kept])
    for field in schema:
        refuse_foreign(field.name, field.type)
    # Batch by batch, so that text columns of a stream are never all in memory.
    table = pa.Table.from_batches([batch.select(kept) for batch in reader], schema)
    return arrow_frame(table).lazy(), names


def arrow_frame(table: pa.Table) -> pl.DataFrame:
    """An Arrow table as a Polars frame, without a copy.

    Raises:
        DataError: Polars cannot hold one of them.
    """
    try:
        # Not rechunked: that would copy every column.
        return pl.DataFrame(pl.from_arrow(table, rechunk=False))
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        columns = ", ".join(f"'{field.name}' ({field.type})" for field in table.schema)
        raise DataError(f"the columns {columns} cannot be read: {error}; cast them first") from None


def native_integer(dtype: pl.DataType) -> bool:
    """Whether the extension reads a column of this type as it is."""
    return dtype.is_integer() and dtype not in (pl.Int128, pl.UInt128)


def hash_duplicates(rows: pl.DataFrame, *options: MiningOptions) -> pl.DataFrame:
    """The rows, with text and token ids of duplicate columns replaced by 64-bit hashes."""
    hashed = _hashed(rows.schema, *options)
    return rows.with_columns(hashed) if hashed else rows


def _hashed(schema: pl.Schema, *options: MiningOptions) -> list[pl.Expr]:
    """The duplicate columns as hashes, but those that hold integers already, or whose values another role needs."""
    others = {column for one in options for role, column in one.columns.items() if role != "duplicate"}
    names = dict.fromkeys(one.duplicate_column for one in options if one.duplicate_column is not None)
    return [
        duplicate_hash(schema[name], name).alias(name)
        for name in names
        if name not in others and not native_integer(schema[name])
    ]


def duplicate_hash(dtype: pl.DataType, name: str) -> pl.Expr:
    """Maps equal values to equal 64-bit integers; null stays null."""
    column = pl.col(name)
    if native_integer(dtype):
        return column
    text = dtype in (pl.String, pl.Binary, pl.Categorical, pl.Enum)
    numbers = isinstance(dtype, pl.List) and isinstance(dtype.inner, pl.DataType) and dtype.inner.is_integer()
    if not (text or numbers):
        raise DataError(
            f"duplicate column '{name}' has dtype {dtype}, but must hold text, lists of token ids, or integers (hashes)"
        )
    if dtype in (pl.Categorical, pl.Enum):
        column = column.cast(pl.String)
    return pl.when(pl.col(name).is_not_null()).then(column.hash())
