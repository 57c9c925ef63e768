"""`mine_files`: mining of Parquet files, in memory if they fit, else streamed."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, Unpack

import polars as pl

from dice_py.config.mining import MiningKeywords, MiningOptions
from dice_py.errors import DataError, UsageError
from dice_py.events import Report, no_report
from dice_py.mining.labels import alpha_per_token
from dice_py.mining.options import read_options, with_mining_signature
from dice_py.mining.pairs import mine_pairs
from dice_py.mining.parquet_input import ScoredFiles, columns_to_read, narrow_batches
from dice_py.mining.segments import SEGMENT_BYTES
from dice_py.mining.streaming import StreamMiner
from dice_py.storage.digests import bytes_digest
from dice_py.storage.files import remove_leftovers
from dice_py.storage.keys import digest
from dice_py.storage.parquet import write_parquet

ROW_BYTES = 48
"""Memory per row that is mined in memory: the columns, the sorted copy, the pairs."""


@with_mining_signature
def mine_files(
    scored: list[str],
    out: Path,
    options: MiningOptions | None = None,
    *,
    memory_gib: float = 1.0,
    report: Report = no_report,
    **keywords: Unpack[MiningKeywords],
) -> dict[str, Any]:
    """Mines Parquet files and writes the pairs to `out`.

    Args:
        scored: files, glob patterns, or folders (Hive-partitioned or plain). The pairs' row numbers count through all
            files, in the order of the arguments and by path inside each. The footer of `out` lists the files.
        out: the Parquet file to write.
        options: all options of `mine_pairs` as one object, in place of keywords.
        memory_gib: GiB for the rows, if prompts are integers; text needs more. Larger input is streamed, which needs
            integer prompts (and policies).
        report: receives progress events.
        **keywords: single options of `mine_pairs`.

    Returns:
        The dict of `MinedPairs.summary`.

    Raises:
        UsageError: an option out of its range, or an `out` that cannot be written.
        DataError: no file, no rows, a missing or unsuitable column, or larger input whose prompts are not integers.
        TypeError: an unknown keyword.
    """
    options = read_options("mine_files", options, keywords)
    files = open_files(scored, out, memory_gib)
    # Places and times do not count, so that two equal minings write equal files.
    key = digest("mine", footers(files), options.model_dump())
    try:
        columns = columns_to_read(files, options)
        if fits_in_memory(files, memory_gib):
            mined = mine_pairs(pl.concat(narrow_batches(files, columns, options), rechunk=False), options)
            report("progress", stage="mine", done=files.rows, total=files.rows)
            summary = mined.summary()
            meta = {**summary, **alpha_per_token(options, mined.alpha), "files": files.files}
            write_parquet(out, mined.pairs, key=key, meta=meta)
            return summary
        segment_rows = max(1, int(memory_gib * 2**30 / SEGMENT_BYTES))
        return StreamMiner(files, columns, options, segment_rows, report).mine(out, key)
    except DataError as error:
        raise DataError(f"{source_name(scored)}: {error}") from None


def open_files(scored: list[str], out: Path | None, memory_gib: float) -> ScoredFiles:
    """The files of a mining, with its other arguments checked (as `mine_files` has them).

    Raises:
        UsageError: `memory_gib` is no number above zero, or `out` cannot be written.
        DataError: no file, or no rows.
    """
    if not (math.isfinite(memory_gib) and memory_gib > 0):
        raise UsageError(f"memory_gib is {memory_gib}, but must be a number of GiB above zero")
    files = ScoredFiles(scored)
    if files.rows == 0:
        raise DataError(f"{', '.join(scored)}: there are no rows; pass files with at least one response")
    _check_files(files.files, out)
    if out is not None:
        remove_leftovers(out.parent, out.name)
    return files


def fits_in_memory(files: ScoredFiles, memory_gib: float) -> bool:
    """Whether the rows can be mined at once in so much memory."""
    return files.rows * ROW_BYTES <= memory_gib * 2**30


def source_name(scored: list[str]) -> str:
    """The files in an error."""
    return scored[0] if len(scored) == 1 else f"{scored[0]}, …"


def footers(files: ScoredFiles) -> list[Any]:
    """Sizes and footers, which stand for the contents in keys: a digest of those would have to read the text, too."""
    return [_footer_digest(Path(file)) for file in files.files]


def _footer_digest(file: Path) -> list[Any]:
    """A Parquet file's size, and the digest of its footer, which has counts and statistics of every column."""
    with file.open("rb") as opened:
        size = opened.seek(0, os.SEEK_END)
        opened.seek(max(0, size - 8))
        footer = int.from_bytes(opened.read(4), "little")
        opened.seek(max(0, size - 8 - footer))
        return [size, bytes_digest(opened.read())]


def _check_files(files: list[str], out: Path | None) -> None:
    """Raises UsageError if a file would be read twice, or if `out` is a folder or one of the files."""
    if out is not None and out.is_dir():
        raise UsageError(f"{out} is a folder: name a file for the pairs")
    if out is not None and _same_file(out) in map(_same_file, map(Path, files)):
        raise UsageError(f"{out} is one of the files to be mined: name another one for the pairs")
    seen: set[object] = set()
    for file in files:
        place = _same_file(Path(file))
        if place in seen:
            raise UsageError(f"{file} is named twice: each file counts once")
        seen.add(place)


def _same_file(path: Path) -> object:
    """What is equal for two names of one file (links, hard ones too); a path where there is none."""
    try:
        found = path.stat()
    except OSError:
        return path
    return (found.st_dev, found.st_ino)
