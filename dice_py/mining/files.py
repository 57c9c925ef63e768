"""Mining of Parquet files: in memory where they fit, else streamed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.config.mining import MineOptions
from dice_py.errors import DataError, UsageError
from dice_py.events import Report, no_report
from dice_py.mining.columns import wanted_columns
from dice_py.mining.pairs import (
    mine_pairs,
)
from dice_py.mining.parquet_input import ScoredFiles
from dice_py.mining.streaming import SEGMENT_BYTES, StreamMiner, narrow_batches
from dice_py.storage.keys import digest
from dice_py.storage.parquet import write_parquet

HELD_BYTES = 48
"""Memory for a row that is mined at once: the columns, the sorted copy, the pairs."""


def mine_files(
    scored: list[str], out: Path, *, memory_gib: float = 1.0, report: Report = no_report, **options: Any
) -> dict[str, Any]:
    """Mines Parquet files into `out`, with the keywords of `mine_pairs`; returns the summary.

    Args:
        scored: files, glob patterns, or folders (Hive-partitioned or plain). The pairs' row numbers count through all
            files, in the order of the arguments and by path inside each; the footer of `out` names the files.
        memory_gib: what the rows may take, if prompts are integers; text comes on top. Larger input is streamed, which
            needs integer prompts (and policies).

    Raises:
        UsageError: an option out of range.
        DataError: no file, no rows, a missing or unsuitable column, or larger input with prompts that are no integers.
    """
    asked = MineOptions(**options)
    if not (math.isfinite(memory_gib) and memory_gib > 0):
        raise UsageError(f"memory_gib is {memory_gib}: give a number of GiB above zero")
    files = ScoredFiles(scored)
    if files.rows == 0:
        raise DataError(f"{', '.join(scored)}: there are no rows; give files with at least one response")
    place = scored[0] if len(scored) == 1 else f"{scored[0]}, …"
    _check_out(files.files, out)
    # Not of their contents: that would read the text, too.
    stats = [(file, Path(file).stat()) for file in files.files]
    key = digest("mine", [(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats], options)
    try:
        columns = wanted_columns(files.schema.names, asked)
        if files.rows * HELD_BYTES <= memory_gib * 2**30:
            mined = mine_pairs(pl.concat(narrow_batches(files, columns, asked), rechunk=False), **options)
            report("progress", stage="mine", done=files.rows, total=files.rows)
            summary = mined.summary()
            write_parquet(out, mined.pairs, key=key, meta={**summary, "files": files.files})
            return summary
        segment_rows = max(1, int(memory_gib * 2**30 / SEGMENT_BYTES))
        return StreamMiner(files, columns, asked, segment_rows, report).mine(out, key)
    except DataError as error:
        raise DataError(f"{place}: {error}") from None


def _check_out(files: list[str], out: Path) -> None:
    """Refuses input that would be read twice, and output that cannot be written or would be input."""
    if out.is_dir():
        raise UsageError(f"{out} is a folder: name a file for the pairs")
    resolved = [Path(file).resolve() for file in files]
    if out.resolve() in resolved:
        raise UsageError(f"{out} is one of the files to be mined: name another one for the pairs")
    seen: set[Path] = set()
    twice = [file for file, path in zip(files, resolved, strict=True) if path in seen or seen.add(path)]  # type: ignore[func-returns-value]
    if twice:
        raise UsageError(f"{twice[0]} is named twice: each file counts once")
