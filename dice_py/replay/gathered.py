"""The mined pairs of a round as rows of a training set, some at a time: of a large round they are no frame in memory.

Texts and token ids are the bulk of a pair. Pairs are gathered in the order in which they were mined, which is that of
the shards: each shard is read once or twice. More than `AT_ONCE` of them wait in a temporary file until the draw has
decided which are trained on.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq

from dice_py.data import prompt_key
from dice_py.errors import DataError
from dice_py.replay.mined import Shards, gather_from, have_equal_answers
from dice_py.storage.files import TEMPORARY, make_folder
from dice_py.storage.parquet import ParquetStream, opened_parquet, table_frame

AT_ONCE = 1 << 16
"""Pairs that are in memory at one time."""
_COLUMNS = ["prompt_id", "messages"]


class Prompts:
    """The prompts artifact, read in parts (row groups): those that some pairs need, or one after the other.

    Raises:
        DataError: the file is absent, cannot be read, or is no prompts artifact.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._open() as file:
            self._bounds = [_bounds(file, number) for number in range(file.num_row_groups)]
            _check_prompts(table_frame(file.schema_arrow.empty_table().select(_COLUMNS)), path)
        self._held: dict[int, pl.DataFrame] = {}  # the parts of the last call

    def _open(self) -> contextlib.AbstractContextManager[pq.ParquetFile]:
        return opened_parquet(self._path, _COLUMNS)

    def of(self, numbers: pl.Series) -> pl.DataFrame:
        """`prompt_id` and `messages` of prompts, at least of those with these numbers that are there."""
        least, most = int(numbers.min() or 0), int(numbers.max() or 0)  # type: ignore[arg-type]
        near = [at for at, bounds in enumerate(self._bounds) if bounds is None or _overlap(bounds, (least, most))]
        with self._open() as file:
            self._held = {at: self._held[at] if at in self._held else _part(file, at) for at in near}
        parts = list(self._held.values())
        return pl.concat(parts) if parts else pl.DataFrame(schema={"prompt_id": numbers.dtype, "messages": pl.Null})

    def keys(self, wanted: Collection[str]) -> dict[int, str]:
        """The keys (`data.prompt_key`) of those prompts whose keys are wanted, by `prompt_id`."""
        found: dict[int, str] = {}
        with self._open() as file:
            for at in range(file.num_row_groups if wanted else 0):
                for number, messages in _part(file, at).iter_rows():
                    key = prompt_key(messages)
                    if key in wanted:
                        found[number] = key
        return found


def _part(file: pq.ParquetFile, at: int) -> pl.DataFrame:
    return table_frame(file.read_row_group(at, columns=_COLUMNS))


def _check_prompts(prompts: pl.DataFrame, file: Path) -> None:
    """Raises DataError if a file is no prompts artifact."""
    ids, messages = prompts["prompt_id"].dtype, prompts["messages"].dtype
    turns = messages.inner if isinstance(messages, pl.List) else None
    fields = {field.name for field in turns.fields} if isinstance(turns, pl.Struct) else set()
    if not (ids.is_integer() and {"role", "content"} <= fields):
        raise DataError(
            f"{file}: prompt_id is {ids} and messages is {messages}, but integers and lists of messages are needed: "
            "give the prompts.parquet that dice generate wrote"
        )


def _bounds(file: pq.ParquetFile, number: int) -> tuple[int, int] | None:
    """The least and the greatest prompt_id of a row group; None: not known."""
    group = file.metadata.row_group(number)
    for at in range(group.num_columns):
        column = group.column(at)
        if column.path_in_schema == "prompt_id":
            known = column.statistics
            least, most = (known.min, known.max) if known is not None and known.has_min_max else (None, None)
            return (least, most) if isinstance(least, int) and isinstance(most, int) else None
    return None


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] <= other[1] and other[0] <= one[1]


class GatheredPairs:
    """The mined pairs, gathered, without those whose answers are equal. A context manager, which removes its file.

    Args:
        folder: for the temporary file.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / f".gathered-pairs.{os.getpid()}{TEMPORARY}"
        self._stack = contextlib.ExitStack()
        self._stream: ParquetStream | None = None
        self._only: pl.DataFrame | None = None
        self.count = 0
        """Pairs that are there."""

    def __enter__(self) -> GatheredPairs:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self._file.unlink(missing_ok=True)

    def gather(self, mined: pl.DataFrame, shards: Shards, prompts: Prompts, *, reference: bool) -> pl.Series:
        """Gathers the pairs; returns which of them have equal answers, and are left out.

        Raises:
            DataError: as `gather_mined`.
        """
        equal = []
        for slice_of in mined.iter_slices(AT_ONCE):
            pairs = gather_from(slice_of, shards, prompts.of(slice_of["prompt_id"]), reference=reference)
            alike = have_equal_answers(pairs)
            self._keep(pairs.filter(~alike), is_only=mined.height <= AT_ONCE)
            equal.append(alike)
        self._stack.close()
        return pl.concat(equal)

    def _keep(self, pairs: pl.DataFrame, *, is_only: bool) -> None:
        self.count += pairs.height
        if is_only:
            self._only = pairs
            return
        if self._stream is None:
            make_folder(self._file.parent)
            self._stream = self._stack.enter_context(ParquetStream(self._file))
        self._stream.write(pairs)

    def take(self, rows: pl.Series) -> Iterator[pl.DataFrame]:
        """The pairs with these numbers, which ascend, some at a time."""
        if rows.is_empty():
            return
        if self._only is not None:
            yield self._only[rows]
            return
        first = 0
        with opened_parquet(self._file, None) as file:
            for at in range(file.num_row_groups):
                part = table_frame(file.read_row_group(at))
                here = rows.filter((rows >= first) & (rows < first + part.height)) - first
                if len(here):
                    yield part[here]
                first += part.height
