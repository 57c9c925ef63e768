"""Mining of Parquet files, held in memory where they fit and streamed where they do not.

Streamed, one segment of whole prompts is in memory at a time:

1. a first pass looks whether prompts come in order, and takes a sample of them;
2. rows in another order are dealt to segments on disk, which are ranges of prompts;
3. passes over the segments find the penalty (one pass, as a rule) or measure the length buckets;
4. a last pass writes the pairs.

The pairs, alpha and counts are those of all rows at once: rust/dice-core/src/stream.rs says why.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from dice_py import _native
from dice_py.config.mining import MAX_LENGTH, MineOptions
from dice_py.errors import DataError, UsageError
from dice_py.events import Report
from dice_py.mining.columns import arrow_frame, hash_duplicates, numeric_columns
from dice_py.mining.pairs import (
    QUANTILES,
    above,
    add_difficulty,
    add_policies,
    column_names,
    finite,
    margin_quantiles,
    quantile,
    with_margin,
)
from dice_py.mining.parquet_input import ScoredFiles
from dice_py.storage.files import TEMPORARY, atomic
from dice_py.storage.parquet import ParquetStream

SEGMENT_BYTES = 256
"""Memory for a row of a segment: the columns as read and as cut, what is read ahead, the sorted copy, the pairs."""
MOST_SEGMENTS = 256
"""Segments on disk: a file is open for each while rows are dealt."""
SAMPLE_ROWS = 1 << 20
KEYS = 1 << 16
"""Prompts that are noted to cut segments by."""


def narrow_batches(files: ScoredFiles, columns: list[str], options: MineOptions) -> Iterator[pl.DataFrame]:
    """Batches of the named columns, in order of rows; those that are compared for duplicates as hashes."""
    for i, batch in enumerate(files.batches(columns)):
        if i % 16 == 0:
            # The pool keeps what decoded pages took.
            pa.default_memory_pool().release_unused()
        if batch.num_rows:
            yield hash_duplicates(arrow_frame(pa.Table.from_batches([batch])), options)


@dataclass
class _Segment:
    """Rows of whole prompts: the columns of the extension."""

    rows: pl.DataFrame
    numbers: pl.Series | int
    """Row numbers, or that of the first row."""


@dataclass
class _Tally:
    """What a summary says of the pairs, added up over segments."""

    pairs: int = 0
    longer: int = 0
    gap: int = 0
    margins: list[pl.Series] = field(default_factory=list)
    consistency: float = 0.0
    consistent: int = 0

    def add(self, pairs: pl.DataFrame) -> None:
        difference = pairs["chosen_length"].cast(pl.Int64) - pairs["rejected_length"].cast(pl.Int64)
        self.pairs += pairs.height
        self.longer += int((difference > 0).sum())
        self.gap += int(difference.sum())
        # Sorted is a copy: a column as it came keeps the memory of all columns of its batch.
        self.margins.append(pairs["margin"].sort())
        if "consistency" in pairs.columns:
            known = (
                pairs.unique("prompt_id", keep="first", maintain_order=True)["consistency"]
                .cast(pl.Float64)
                .drop_nulls()
            )
            self.consistency += float(known.sum())
            self.consistent += len(known)

    @property
    def all_margins(self) -> pl.Series:
        return pl.concat(self.margins) if self.margins else pl.Series("margin", [], pl.Float32)


def _remove_left(out: Path) -> None:
    """Removes what a process that was killed left beside `out`."""
    for path in out.parent.iterdir():
        number = path.name.removeprefix(f".{out.name}.").split(".")[0]
        ours = path.name.startswith(f".{out.name}.") and path.name.endswith(TEMPORARY) and number.isdigit()
        if ours and path.is_dir() and not _lives(int(number)):
            shutil.rmtree(path, ignore_errors=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


class StreamMiner:
    def __init__(
        self, files: ScoredFiles, columns: list[str], options: MineOptions, segment_rows: int, report: Report
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

    def mine(self, out: Path, key: str) -> dict[str, Any]:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_left(out)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.{os.getpid()}.", suffix=TEMPORARY, dir=out.parent))
        try:
            return self._mine(work, out, key)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _mine(self, work: Path, out: Path, key: str) -> dict[str, Any]:
        miner = _native.SegmentMiner(self.options.native())
        in_order, keys, sample = self._look()
        if sample.height:
            with column_names(self.options):
                miner.look(sample.to_struct("rows"))
        del sample
        segments = self._in_order if in_order else self._dealt(work, keys)
        number = 0
        while miner.needs_pass():
            number += 1
            for segment in self._told(segments, f"pass {number}"):
                with column_names(self.options):
                    miner.observe(segment.rows.to_struct("rows"))
            miner.end_pass()
        first, count, tally = work / "pairs.parquet", 0, _Tally()
        with ParquetStream(first) as writer:
            for segment in self._told(segments, "pairs"):
                with column_names(self.options):
                    found = arrow_frame(miner.pairs(segment.rows.to_struct("rows")).read_all())
                count += found.height
                pairs = with_margin(self._named(found, segment), self.options)
                tally.add(pairs)
                writer.write(pairs)
        return self._finish(miner.summary(), first, count, tally, out, key)

    def _told(self, segments: Callable[[], Iterator[_Segment]], name: str) -> Iterator[_Segment]:
        """The segments, with progress told after each."""
        done = 0
        for segment in segments():
            yield segment
            done += segment.rows.height
            self.report("progress", stage="mine", step=name, done=done, total=self.files.rows)

    def _numeric(self) -> Iterator[pl.DataFrame]:
        """Batches of the columns of the extension."""
        for narrow in narrow_batches(self.files, self.columns, self.options):
            yield numeric_columns(narrow, self.options)[0]

    def _look(self) -> tuple[bool, pl.Series, pl.DataFrame]:
        """Whether prompts never fall; prompts to cut segments by; some whole prompts, as a sample."""
        in_order, last = True, None
        keys: list[pl.Series] = []
        sample: list[pl.DataFrame] = []
        every, done = max(1, self.files.rows // KEYS), 0
        share = max(1, self.files.rows // SAMPLE_ROWS)
        for rows in self._numeric():
            prompts = rows["prompt"]
            self._refuse_bad(rows, done)
            in_order = in_order and prompts.is_sorted() and (last is None or prompts[0] >= last)
            last = prompts[-1]
            keys.append(prompts.gather_every(every, offset=-done % every))
            # All rows of a prompt are in the sample, or none.
            sample.append(rows.filter(prompts.hash() % share == 0))
            done += rows.height
            self.report("progress", stage="mine", step="look", done=done, total=self.files.rows)
        return in_order, pl.concat(keys).sort(), pl.concat(sample, rechunk=False)

    def _refuse_bad(self, rows: pl.DataFrame, start: int) -> None:
        """Refuses what the extension would refuse, with row numbers of the whole input."""
        for role in ("prompt", "policy"):
            if role in rows.columns and rows[role].null_count():
                null = start + int(rows[role].is_null().arg_max() or 0)
                name = self.options.columns[role]
                raise DataError(f"row {null}: the {role} is null; fill or drop such rows first (column '{name}')")
        length = rows["length"]
        if length.dtype.is_signed_integer() or length.dtype == pl.UInt64:
            # Narrower types do not hold the bound to compare with.
            wide = length if length.dtype == pl.UInt64 else length.cast(pl.Int64)
            bad = ((wide < 0) | (wide > MAX_LENGTH)).fill_null(False)
            if bad.any():
                row = int(bad.arg_max() or 0)
                raise DataError(
                    f"row {start + row}: the length is {length[row]}; lengths are counts between 0 and {MAX_LENGTH}: "
                    f"correct or drop such rows (column '{self.options.length_column}')"
                )

    def _in_order(self) -> Iterator[_Segment]:
        """Segments of rows that are in order."""
        held: list[pl.DataFrame] = []
        start, size = 0, 0
        for rows in self._numeric():
            held.append(rows)
            size += rows.height
            if size < self.segment_rows:
                continue
            whole = pl.concat(held, rechunk=False)
            # The last prompt may go on.
            cut = int(whole["prompt"].search_sorted(whole["prompt"][-1], side="left"))
            if cut:
                yield _Segment(whole[:cut], start)
                start += cut
            held, size = [whole[cut:]], whole.height - cut
        if size:
            yield _Segment(pl.concat(held, rechunk=False), start)

    def _dealt(self, work: Path, keys: pl.Series) -> Callable[[], Iterator[_Segment]]:
        """Deals rows in any order to segments on disk."""
        count = math.ceil(self.files.rows / self.segment_rows)
        if count > MOST_SEGMENTS:
            raise UsageError(
                f"{self.files.rows} rows in random order would take {count} segments of --memory (memory_gib), but at "
                f"most {MOST_SEGMENTS} can be open: raise it, or sort the rows by prompt"
            )
        cuts = keys.gather([len(keys) * i // count for i in range(1, count)]).unique().sort()
        names: list[int] = []
        done = 0
        with ExitStack() as stack:
            writers: dict[int, pa.ipc.RecordBatchFileWriter] = {}
            for rows in self._numeric():
                numbers = pl.int_range(done, done + rows.height, dtype=pl.UInt64, eager=True).alias("row")
                part = cuts.search_sorted(rows["prompt"], side="right").alias("part")
                for (name,), some in rows.with_columns(numbers, part).group_by("part"):
                    table = some.drop("part").to_arrow(compat_level=pl.CompatLevel.oldest())
                    if name not in writers:
                        sink = stack.enter_context(pa.OSFile(str(work / f"segment-{name:05d}.arrow"), "wb"))
                        writers[name] = stack.enter_context(pa.ipc.new_file(sink, table.schema))
                    writers[name].write_table(table)
                done += rows.height
                self.report("progress", stage="mine", step="deal", done=done, total=self.files.rows)
            names = sorted(writers)

        def read() -> Iterator[_Segment]:
            for name in names:
                with pa.OSFile(str(work / f"segment-{name:05d}.arrow"), "rb") as source:
                    rows = arrow_frame(pa.ipc.open_file(source).read_all())
                yield _Segment(rows.drop("row"), rows["row"])

        return read

    def _named(self, pairs: pl.DataFrame, segment: _Segment) -> pl.DataFrame:
        """The pairs of a segment, with row numbers of the whole input and the names of `mine_pairs`."""
        pairs = pairs.rename({"prompt": "prompt_id"})
        if self.options.policy_column is not None:
            pairs = add_policies(pairs, segment.rows["policy"])
        sides = ("chosen_row", "rejected_row")
        if isinstance(segment.numbers, int):
            return pairs.with_columns((pl.col(side) + segment.numbers).cast(pl.UInt64) for side in sides)
        return pairs.with_columns(segment.numbers.gather(pairs[side]).alias(side) for side in sides)

    def _finish(
        self, found: _native.MineSummary, first: Path, count: int, tally: _Tally, out: Path, key: str
    ) -> dict[str, Any]:
        """Applies what depends on all margins, and writes `out`."""
        options = self.options
        dropped = {"below_min_margin": count - tally.pairs, "below_quantile": 0}
        least, least_easy = options.min_margin_quantile, options.difficulty_quantile
        final = tally
        source = pq.ParquetFile(first)
        with atomic(out) as temporary, ParquetStream(temporary) as writer:
            if least is None and least_easy is None:
                for batch in source.iter_batches():
                    writer.write_arrow(pa.Table.from_batches([batch]))
            else:
                margins = tally.all_margins
                if least is not None:
                    least = quantile(margins, least)
                    margins = margins.filter(margins.cast(pl.Float64) >= least)
                if least_easy is not None:
                    least_easy = quantile(margins, least_easy)
                final = _Tally()
                for batch in source.iter_batches():
                    pairs = arrow_frame(pa.Table.from_batches([batch]))
                    pairs = pairs if least is None else above(pairs, least)
                    pairs = pairs if least_easy is None else add_difficulty(pairs, least_easy)
                    final.add(pairs)
                    writer.write(pairs)
                dropped["below_quantile"] = tally.pairs - final.pairs
            if not final.pairs:
                # The columns all the same.
                none = arrow_frame(source.schema_arrow.empty_table())
                writer.write(none if least_easy is None else add_difficulty(none, 0.0))
            summary = _summary(found, final, dropped)
            writer.describe(key, {**summary, "files": self.files.files})
        return summary


def _summary(found: _native.MineSummary, tally: _Tally, dropped_pairs: dict[str, int]) -> dict[str, Any]:
    """The dict of `MinedPairs.summary`."""
    share = tally.longer / tally.pairs if tally.pairs else None
    quantiles = margin_quantiles(tally.all_margins) if tally.pairs else dict.fromkeys(QUANTILES, math.nan)
    return {
        "pairs": tally.pairs,
        "alpha": finite(found.alpha),
        "alpha_low": finite(found.alpha_low),
        "alpha_high": finite(found.alpha_high),
        "mean_length_gap_before": finite(found.mean_length_gap_before),
        "mean_length_gap_after": tally.gap / tally.pairs if tally.pairs else None,
        "chosen_longer_share": share,
        "reward_length_correlation_before": finite(found.correlation_before),
        "reward_length_correlation_after": finite(found.correlation_after),
        "margin_quantiles": {name: finite(value) for name, value in quantiles.items()},
        "mean_consistency": tally.consistency / tally.consistent if tally.consistent else None,
        "dropped": dict(found.dropped),
        "dropped_prompts": dict(found.dropped_prompts),
        "dropped_pairs": dropped_pairs,
        "prompts": found.prompts,
        "rows": found.rows,
    }
