"""The columns that the miner needs of a frame, as numbers: without copying those that are.

Only these columns are collected of a LazyFrame or kept of an Arrow stream. Text is read only to compare responses
(`duplicate_column`), and then hashed on the way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeAlias

import polars as pl

from dice_py.config.mining import MineOptions
from dice_py.errors import DataError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa


class ArrowStream(Protocol):
    """Anything with the Arrow PyCapsule interface: pandas, DuckDB, DataFusion, arro3, …"""

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object: ...


Frame: TypeAlias = "pl.DataFrame | pl.LazyFrame | pa.Table | pa.RecordBatchReader | ArrowStream"


def narrow_frame(frame: Frame, options: MineOptions) -> pl.DataFrame:
    """The named columns of a frame, as they are.

    Raises:
        UsageError: it is no frame.
        DataError: a column is missing, or there are no rows.
    """
    lazy, columns = _open(frame, options)
    wanted = wanted_columns(columns, options)
    chosen = lazy.select(wanted)
    hashed = _hashed(chosen.collect_schema(), options)
    # Text and token ids are hashed as they are read: they are never in memory as a whole.
    narrow = chosen.collect() if hashed is None else chosen.with_columns(hashed).collect(engine="streaming")
    if narrow.height == 0:
        raise DataError("the frame has no rows: give a table with at least one response")
    return narrow


def wanted_columns(columns: list[str], options: MineOptions) -> list[str]:
    """The columns that the options name, of those that there are.

    Raises:
        DataError: one is not there.
    """
    for role, name in options.columns.items():
        if name not in columns:
            raise DataError(missing_column(name, columns, f"{role}_column=/--{role.replace('_', '-')}-column"))
    wanted = dict.fromkeys(options.columns.values())
    if options.truncated_column == "auto":
        wanted |= {"finish_reason": None} if "finish_reason" in columns else {}
    elif options.truncated_column is not None:
        if options.truncated_column not in columns:
            raise DataError(missing_column(options.truncated_column, columns, "truncated_column="))
        wanted |= {options.truncated_column: None}
    return list(wanted)


def numeric_columns(narrow: pl.DataFrame, options: MineOptions) -> tuple[pl.DataFrame, bool]:
    """The columns of a narrow frame under the names and in the types of the extension; and whether the prompts are
    integers, which come back as they are (others come back as their rank).

    Raises:
        DataError: a column is of an unsuitable type.
    """
    key, native_key = _ordered(narrow, options.prompt_column, "prompt")
    columns = [key, _reward(narrow, options.reward_column, "reward"), _length(narrow, options.length_column)]
    truncated = _truncated(narrow, options.truncated_column)
    if truncated is not None:
        columns.append(truncated.alias("truncated"))
    if options.duplicate_column is not None:
        name = options.duplicate_column
        columns.append(_duplicate(narrow.schema[name], name).alias("duplicate"))
    if options.policy_column is not None:
        columns.append(_ordered(narrow, options.policy_column, "policy")[0])
    if options.second_reward_column is not None:
        columns.append(_reward(narrow, options.second_reward_column, "second"))
    return narrow.select(columns), native_key


def missing_column(name: str, columns: list[str], option: str) -> str:
    return f"column '{name}' not found in the frame; columns are {', '.join(columns)}; name it with {option}"


def _open(frame: Frame, options: MineOptions) -> tuple[pl.LazyFrame, list[str]]:
    """The frame and the names of all its columns. Of Arrow input only the wanted columns are kept."""
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
            f"cannot mine a {type(frame).__name__}: give a Polars DataFrame or LazyFrame, a pyarrow Table, "
            "or anything with __arrow_c_stream__"
        )
    names = reader.schema.names
    kept = wanted_columns(names, options)
    schema = pa.schema([reader.schema.field(name) for name in kept])
    for field in schema:
        refuse_foreign(field.name, field.type)
    # Batch by batch, so that text columns of a stream are never all in memory.
    table = pa.Table.from_batches([batch.select(kept) for batch in reader], schema)
    return arrow_frame(table).lazy(), names


def arrow_frame(table: pa.Table) -> pl.DataFrame:
    """The columns of an Arrow table, in place.

    Raises:
        DataError: Polars cannot hold one of them.
    """
    try:
        # Not rechunked: that would copy every column.
        return pl.DataFrame(pl.from_arrow(table, rechunk=False))
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        columns = ", ".join(f"'{field.name}' ({field.type})" for field in table.schema)
        raise DataError(f"the columns {columns} cannot be read: {error}; cast them first") from None


def refuse_foreign(name: str, dtype: pa.DataType) -> None:
    """Refuses Arrow types that Polars does not know (it would panic at some)."""
    import pyarrow as pa

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
            refuse_foreign(name, dtype.field(i).type)


def _native_integer(dtype: pl.DataType) -> bool:
    return dtype.is_integer() and dtype not in (pl.Int128, pl.UInt128)


def _ordered(narrow: pl.DataFrame, name: str, role: str) -> tuple[pl.Expr, bool]:
    """A column as integers in its order, and whether it is so already."""
    dtype = narrow.schema[name]
    key = pl.col(name)
    if _native_integer(dtype):
        return key.alias(role), True
    if dtype in (pl.Categorical, pl.Enum):
        # By text: the physical order of a categorical depends on what was read before.
        key = key.cast(pl.String)
    elif dtype.is_nested() or dtype in (pl.Object, pl.Null, pl.Unknown):
        raise DataError(f"{role} column '{name}' has dtype {dtype}, which has no order: give integers or text")
    return key.rank("dense").alias(role), False


def _reward(narrow: pl.DataFrame, name: str, role: str) -> pl.Expr:
    dtype = narrow.schema[name]
    if dtype in (pl.Float32, pl.Float64):
        return pl.col(name).alias(role)
    if dtype.is_numeric() or dtype == pl.Null:
        return pl.col(name).cast(pl.Float64).alias(role)
    raise DataError(f"reward column '{name}' has dtype {dtype}, but must be numeric: cast it to Float32 first")


def _length(narrow: pl.DataFrame, name: str) -> pl.Expr:
    dtype = narrow.schema[name]
    if _native_integer(dtype):
        return pl.col(name).alias("length")
    if dtype == pl.Null:
        return pl.col(name).cast(pl.UInt32).alias("length")
    raise DataError(f"length column '{name}' has dtype {dtype}, but must hold whole numbers: cast it to UInt32 first")


def _truncated(narrow: pl.DataFrame, option: str | None) -> pl.Expr | None:
    if option is None:
        return None
    if option == "auto":
        has = "finish_reason" in narrow.columns
        return (pl.col("finish_reason").cast(pl.String) == "length") if has else None
    if narrow.schema[option] != pl.Boolean:
        raise DataError(
            f"column '{option}' has dtype {narrow.schema[option]}, but truncated_column= must name a boolean column"
        )
    return pl.col(option)


def hash_duplicates(rows: pl.DataFrame, options: MineOptions) -> pl.DataFrame:
    """The rows with text and token ids of the duplicate column as hashes."""
    hashed = _hashed(rows.schema, options)
    return rows if hashed is None else rows.with_columns(hashed)


def _hashed(schema: pl.Schema, options: MineOptions) -> pl.Expr | None:
    """The duplicate column as hashes, unless it is integers already or is needed as it is for something else."""
    name = options.duplicate_column
    others = [column for role, column in options.columns.items() if role != "duplicate"]
    if name is None or name in others or _native_integer(schema[name]):
        return None
    return _duplicate(schema[name], name).alias(name)


def _duplicate(dtype: pl.DataType, name: str) -> pl.Expr:
    """Equal values to equal integers of 64 bits; null stays null."""
    column = pl.col(name)
    if _native_integer(dtype):
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
