"""Mining of Parquet files that do not fit in memory: several passes, with one segment of the rows in memory at a time.

1. A scan finds out whether prompts are in order, and takes a sample of them.
2. Rows in any other order are partitioned into segment files (segments.py).
3. Passes over the segments find the penalty (usually one pass) or measure the length buckets.
4. A last pass writes the pairs.

The pairs, alpha and counts are those of all rows mined at once; rust/dice-core/src/stream.rs explains why.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from dice_py import _native
from dice_py.config.mining import MiningOptions
from dice_py.events import Report
from dice_py.mining.columns import arrow_frame, column_names
from dice_py.mining.labels import (
    QUANTILES,
    add_difficulty,
    add_policies,
    alpha_per_token,
    apply_margin_options,
    drop_below,
    finite,
    least_easy_margin,
    margin_quantiles,
    quantile,
)
from dice_py.mining.options import native_keywords
from dice_py.mining.pairs import curve_of
from dice_py.mining.parquet_input import ScoredFiles
from dice_py.mining.segments import Segment, SegmentReader, read_segments
from dice_py.storage.files import TEMPORARY, atomic, make_folder
from dice_py.storage.parquet import ParquetStream


class StreamMiner:
    """Mines scored files segment by segment.

    Args:
        columns: the columns to read (`wanted_columns`).
        segment_rows: about the rows of a segment.

    Raises:
        DataError: prompts or policies are not integers.
    """

    def __init__(
        self, files: ScoredFiles, columns: list[str], options: MiningOptions, segment_rows: int, report: Report
    ) -> None:
        self.files, self.options, self.report = files, options, report
        self.reader = SegmentReader(files, columns, options, segment_rows, report)
        self.curve = pl.DataFrame()
        """That of `MinedPairs`, after mining."""

    def mine(self, out: Path, key: str) -> dict[str, Any]:
        """Writes the pairs to `out`, and returns the dict of `MinedPairs.summary`.

        Raises:
            DataError: an unsuitable column or value.
            UsageError: rows in random order that need too many segments.
        """
        make_folder(out.parent)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.{os.getpid()}.", suffix=TEMPORARY, dir=out.parent))
        try:
            return self._mine(folder, out, key)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _mine(self, folder: Path, out: Path, key: str) -> dict[str, Any]:
        miner = _native.SegmentMiner(native_keywords(self.options))
        segments = self._prepare(miner, folder)
        number = 0
        while miner.needs_pass():
            number += 1
            for segment in self._with_progress(segments, f"pass {number}"):
                with column_names(self.options):
                    miner.observe(segment.rows.to_struct("rows"))
            miner.end_pass()
        unfiltered, count, totals = folder / "pairs.parquet", 0, _Totals()
        with ParquetStream(unfiltered) as writer:
            for segment in self._with_progress(segments, "pairs"):
                with column_names(self.options):
                    pairs = arrow_frame(miner.pairs(segment.rows.to_struct("rows")).read_all())
                count += pairs.height
                pairs = apply_margin_options(self._name_rows(pairs, segment), self.options)
                totals.add(pairs)
                writer.write(pairs)
        mined = miner.summary()
        self.curve = curve_of(mined)
        dropped = {"tied": mined.tied_pairs, "below_min_margin": count - totals.pairs, "below_quantile": 0}
        return self._finish(mined, unfiltered, totals, dropped, out, key)

    def _prepare(self, miner: _native.SegmentMiner, folder: Path) -> Callable[[], Iterator[Segment]]:
        """Scans the input, estimates the penalty from the sample, and returns how to read the segments."""
        scan = self.reader.scan()
        if scan.sample.height:
            with column_names(self.options):
                miner.estimate(scan.sample.to_struct("rows"))
        if scan.in_order:
            return self.reader.in_order
        keys = scan.keys
        del scan  # frees the sample before rows are partitioned
        paths = self.reader.partition(folder, keys)
        return lambda: read_segments(paths)

    def _with_progress(self, segments: Callable[[], Iterator[Segment]], step: str) -> Iterator[Segment]:
        """The segments, with a progress report after each."""
        done = 0
        for segment in segments():
            yield segment
            done += segment.rows.height
            self.report("progress", stage="mine", step=step, done=done, total=self.files.rows)

    def _name_rows(self, pairs: pl.DataFrame, segment: Segment) -> pl.DataFrame:
        """The pairs of a segment, with row numbers of the input and the column names of `mine_pairs`."""
        pairs = pairs.rename({"prompt": "prompt_id"})
        if self.options.policy_column is not None:
            pairs = add_policies(pairs, segment.rows["policy"])
        sides = ("chosen_row", "rejected_row")
        if isinstance(segment.numbers, int):
            return pairs.with_columns((pl.col(side) + segment.numbers).cast(pl.UInt64) for side in sides)
        return pairs.with_columns(segment.numbers.gather(pairs[side]).alias(side) for side in sides)

    def _finish(
        self,
        mined: _native.MineSummary,
        unfiltered: Path,
        totals: _Totals,
        dropped_pairs: dict[str, int],
        out: Path,
        key: str,
    ) -> dict[str, Any]:
        """Applies the options that depend on all margins, and writes `out`."""
        least, least_easy = self.options.min_margin_quantile, self.options.difficulty_quantile
        final = totals
        source = pq.ParquetFile(unfiltered.absolute())
        with atomic(out) as temporary, ParquetStream(temporary) as writer:
            if least is None and least_easy is None:
                for batch in source.iter_batches():
                    writer.write_arrow(pa.Table.from_batches([batch]))
            else:
                margins = totals.all_margins
                if least is not None:
                    least = quantile(margins, least)
                    margins = margins.filter(margins.cast(pl.Float64) >= least)
                if least_easy is not None:
                    least_easy = least_easy_margin(margins, least_easy)
                final = _Totals()
                for batch in source.iter_batches():
                    pairs = arrow_frame(pa.Table.from_batches([batch]))
                    pairs = pairs if least is None else drop_below(pairs, least)
                    pairs = pairs if least_easy is None else add_difficulty(pairs, least_easy)
                    final.add(pairs)
                    writer.write(pairs)
                dropped_pairs["below_quantile"] = totals.pairs - final.pairs
            if not final.pairs:
                # A file without rows still has the columns.
                empty = arrow_frame(source.schema_arrow.empty_table())
                writer.write(empty if least_easy is None else add_difficulty(empty, 0.0))
            summary = _summary(mined, final, dropped_pairs)
            per_token = alpha_per_token(self.options, mined.alpha)
            writer.describe(key, {**summary, **per_token, "files": self.files.files})
        return summary


@dataclass
class _Totals:
    """The numbers of a summary that depend on the pairs, added up over segments."""

    pairs: int = 0
    longer: int = 0
    """Pairs whose chosen response is the longer one."""
    gap: int = 0
    """Sum of chosen length - rejected length."""
    margins: list[pl.Series] = field(default_factory=list)
    consistency: float = 0.0
    """Sum over the prompts that have one."""
    consistent: int = 0
    """The number of these prompts."""

    def add(self, pairs: pl.DataFrame) -> None:
        difference = pairs["chosen_length"].cast(pl.Int64) - pairs["rejected_length"].cast(pl.Int64)
        self.pairs += pairs.height
        self.longer += int((difference > 0).sum())
        self.gap += int(difference.sum())
        # Sorting copies. The column itself would keep the memory of all columns of its batch alive.
        self.margins.append(pairs["margin"].sort())
        if "consistency" in pairs.columns:
            by_prompt = pairs.unique("prompt_id", keep="first", maintain_order=True)
            known = by_prompt["consistency"].cast(pl.Float64).drop_nulls()
            self.consistency += float(known.sum())
            self.consistent += len(known)

    @property
    def all_margins(self) -> pl.Series:
        return pl.concat(self.margins) if self.margins else pl.Series("margin", [], pl.Float32)


def _summary(mined: _native.MineSummary, totals: _Totals, dropped_pairs: dict[str, int]) -> dict[str, Any]:
    """The dict of `MinedPairs.summary`."""
    quantiles = margin_quantiles(totals.all_margins) if totals.pairs else dict.fromkeys(QUANTILES, math.nan)
    return {
        "pairs": totals.pairs,
        "alpha": finite(mined.alpha),
        "alpha_low": finite(mined.alpha_low),
        "alpha_high": finite(mined.alpha_high),
        "mean_length_gap_before": finite(mined.mean_length_gap_before),
        "mean_length_gap_after": totals.gap / totals.pairs if totals.pairs else None,
        "chosen_longer_share": totals.longer / totals.pairs if totals.pairs else None,
        "reward_length_correlation_before": finite(mined.correlation_before),
        "reward_length_correlation_after": finite(mined.correlation_after),
        "margin_quantiles": {name: finite(value) for name, value in quantiles.items()},
        "mean_consistency": totals.consistency / totals.consistent if totals.consistent else None,
        "dropped": dict(mined.dropped),
        "dropped_prompts": dict(mined.dropped_prompts),
        "dropped_pairs": dropped_pairs,
        "prompts": mined.prompts,
        "rows": mined.rows,
    }
