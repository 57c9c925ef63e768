"""Input that does not fit in memory, cut into segments: rows of complete prompts, one segment in memory at a time.

Prompts in ascending order are cut as they are read. Rows in any other order are first written to segment files on disk,
each of a range of prompts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa

from dice_py.config.mining import MAX_LENGTH, MiningOptions
from dice_py.errors import DataError, UsageError
from dice_py.events import Report
from dice_py.mining.columns import arrow_frame
from dice_py.mining.numeric import numeric_columns
from dice_py.mining.parquet_input import ScoredFiles, narrow_batches

SEGMENT_BYTES = 256
"""Memory per row of a segment: the columns as read and as cut, the rows read ahead, the sorted copy, the pairs."""
MAX_SEGMENTS = 256
"""The most segment files: all of them are open while rows are partitioned."""
SAMPLE_ROWS = 1 << 20
"""Rows of the sample from which the penalty is first estimated, roughly."""
CUT_KEYS = 1 << 16
"""Prompts that are kept to place the cuts between segment files, roughly."""


@dataclass
class Segment:
    """Rows of complete prompts, with the columns of the extension."""

    rows: pl.DataFrame
    numbers: pl.Series | int
    """The row number of each row in the input; an int is that of the first of consecutive rows."""


@dataclass
class Scan:
    """The result of the first pass over the input."""

    in_order: bool
    """Whether prompts are in ascending order."""
    keys: pl.Series
    """Prompts at regular distances, sorted."""
    sample: pl.DataFrame
    """All rows of a random share of the prompts."""


class SegmentReader:
    """Reads scored files as segments.

    Args:
        columns: the columns to read (`wanted_columns`).
        segment_rows: about the rows of a segment; a longer prompt is not cut.

    Raises:
        DataError: prompts or policies are not integers.
    """

    def __init__(
        self, files: ScoredFiles, columns: list[str], options: MiningOptions, segment_rows: int, report: Report
    ) -> None:
        self.files, self.columns, self.options = files, columns, options
        self.segment_rows, self.report = segment_rows, report
        for role in ("prompt", "policy"):
            name = options.columns.get(role)
            dtype = None if name is None else files.schema.field(name).type
            if dtype is not None and not pa.types.is_integer(dtype):
                raise DataError(
                    f"{role} column '{name}' has the type {dtype}: {files.rows} rows are more than --memory "
                    "(memory_gib) holds, and streaming them needs integers: number them first, or raise it"
                )

    def scan(self) -> Scan:
        """Reads all rows once.

        Raises:
            DataError: a null prompt or policy, or a length out of range.
        """
        in_order, last = True, None
        keys: list[pl.Series] = []
        sample: list[pl.DataFrame] = []
        key_step, done = max(1, self.files.rows // CUT_KEYS), 0
        share = max(1, self.files.rows // SAMPLE_ROWS)
        for rows in self._batches():
            prompts = rows["prompt"]
            self._check(rows, done)
            in_order = in_order and prompts.is_sorted() and (last is None or prompts[0] >= last)
            last = prompts[-1]
            keys.append(prompts.gather_every(key_step, offset=-done % key_step))
            # By hash, so that all rows of a prompt are in the sample, or none.
            sample.append(rows.filter(prompts.hash() % share == 0))
            done += rows.height
            self.report("progress", stage="mine", step="scan", done=done, total=self.files.rows)
        return Scan(in_order, pl.concat(keys).sort(), pl.concat(sample, rechunk=False))

    def in_order(self) -> Iterator[Segment]:
        """Segments of input whose prompts are in ascending order."""
        held: list[pl.DataFrame] = []
        start, size = 0, 0
        for rows in self._batches():
            held.append(rows)
            size += rows.height
            if size < self.segment_rows:
                continue
            joined = pl.concat(held, rechunk=False)
            # The next batch may continue the last prompt.
            cut = int(joined["prompt"].search_sorted(joined["prompt"][-1], side="left"))
            if cut:
                yield Segment(joined[:cut], start)
                start += cut
            held, size = [joined[cut:]], joined.height - cut
        if size:
            yield Segment(pl.concat(held, rechunk=False), start)

    def partition(self, folder: Path, keys: pl.Series) -> list[Path]:
        """Writes rows in any order to segment files in `folder`, and returns them by ascending prompts.

        Raises:
            UsageError: there would be too many files.
        """
        count = math.ceil(self.files.rows / self.segment_rows)
        if count > MAX_SEGMENTS:
            raise UsageError(
                f"{self.files.rows} rows in random order would take {count} segments of --memory (memory_gib), but at "
                f"most {MAX_SEGMENTS} can be open: raise it, or sort the rows by prompt"
            )
        cuts = keys.gather([len(keys) * i // count for i in range(1, count)]).unique().sort()
        paths: dict[int, Path] = {}
        done = 0
        with ExitStack() as stack:
            writers: dict[int, pa.ipc.RecordBatchFileWriter] = {}
            for rows in self._batches():
                numbers = pl.int_range(done, done + rows.height, dtype=pl.UInt64, eager=True).alias("row")
                part = cuts.search_sorted(rows["prompt"], side="right").alias("part")
                for (number,), group in rows.with_columns(numbers, part).group_by("part"):
                    table = group.drop("part").to_arrow(compat_level=pl.CompatLevel.oldest())
                    if number not in writers:
                        paths[number] = folder / f"segment-{number:05d}.arrow"
                        sink = stack.enter_context(pa.OSFile(str(paths[number]), "wb"))
                        writers[number] = stack.enter_context(pa.ipc.new_file(sink, table.schema))
                    writers[number].write_table(table)
                done += rows.height
                self.report("progress", stage="mine", step="partition", done=done, total=self.files.rows)
        return [paths[number] for number in sorted(paths)]

    def _batches(self) -> Iterator[pl.DataFrame]:
        """The input in the columns of the extension."""
        first_row = 0
        for narrow in narrow_batches(self.files, self.columns, self.options):
            yield numeric_columns(narrow, self.options, first_row)[0]
            first_row += narrow.height

    def _check(self, rows: pl.DataFrame, start: int) -> None:
        """Makes the extension's checks with row numbers of the input; it only knows those of a segment."""
        for role in ("prompt", "policy"):
            if role in rows.columns and rows[role].null_count():
                null = start + int(rows[role].is_null().arg_max() or 0)
                name = self.options.columns[role]
                raise DataError(f"row {null}: the {role} is null; fill or drop such rows first (column '{name}')")
        length = rows["length"]
        if length.dtype.is_signed_integer() or length.dtype == pl.UInt64:
            # Narrower types cannot hold the bound that they are compared with.
            wide = length if length.dtype == pl.UInt64 else length.cast(pl.Int64)
            bad = ((wide < 0) | (wide > MAX_LENGTH)).fill_null(False)
            if bad.any():
                row = int(bad.arg_max() or 0)
                raise DataError(
                    f"row {start + row}: the length is {length[row]}; lengths are counts between 0 and {MAX_LENGTH}: "
                    f"correct or drop such rows (column '{self.options.length_column}')"
                )


def read_segments(paths: list[Path]) -> Iterator[Segment]:
    """The segments that `SegmentReader.partition` wrote."""
    for path in paths:
        with pa.OSFile(str(path), "rb") as source:
            rows = arrow_frame(pa.ipc.open_file(source).read_all())
        yield Segment(rows.drop("row"), rows["row"])
