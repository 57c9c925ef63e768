"""The replay buffer: a uniform sample of the pairs mined in all rounds, in append-only Parquet files.

There is one file per round. Each appended pair gets a random priority from (seed, round, index), and the buffer is
the `capacity` pairs of least priority over all files. This is a uniform sample without replacement of all pairs ever
appended, for any number of rounds (reservoir sampling: Vitter 1985, doi 10.1145/3147.3165; by priorities: bottom-k
sampling, Cohen and Kaplan 2007, doi 10.1145/1281100.1281133, which is Efraimidis and Spirakis 2006, doi
10.1016/j.ipl.2005.11.003, with equal weights). A pair that is not among the `capacity` least priorities of its own
and the earlier rounds can never enter the sample, so it is not written. Written files never change.

The key of a file is a hash of the key of its pairs and of the keys of all earlier files. So appending a round twice
does nothing, a round with other pairs is replaced, and a file is refused if earlier rounds changed after it was
written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import polars as pl

from dice_py.errors import DataError, UsageError
from dice_py.events import Report, no_report
from dice_py.storage.integrity import is_kept
from dice_py.storage.keys import digest, seed_for
from dice_py.storage.parquet import intact_key, parquet_key, parquet_meta, parquet_rows, write_parquet

_RESERVED = {"round": pl.UInt32, "index": pl.UInt32, "priority": pl.UInt64}
_BY_PRIORITY = ["priority", "round", "index"]
_FILE_NAME = re.compile(r"round-(\d+)\.parquet")


class ReplayBuffer:
    """At most `capacity` pairs, a uniform sample of all pairs appended to `folder`.

    One process may append at a time; any number may read.

    Args:
        folder: has `round-NN.parquet` for each round; created by the first append. Other files, such as the
            temporary files of a killed process, are ignored.
        capacity: pairs, 1 or more.
        seed: 0 or more; decides the priorities.

    Raises:
        UsageError: capacity or seed is out of range.
    """

    def __init__(self, folder: Path, capacity: int, seed: int) -> None:
        if capacity < 1:
            raise UsageError(f"the capacity of the replay buffer is {capacity}, but must be 1 or more")
        if seed < 0:
            raise UsageError(f"the seed of the replay buffer is {seed}, but must be an integer of zero or more")
        self.folder, self.capacity, self.seed = folder, capacity, seed

    def path(self, round_number: int) -> Path:
        """The file of a round, whether or not it exists."""
        return self.folder / f"round-{round_number:02d}.parquet"

    def rounds(self, before: int | None = None) -> list[int]:
        """The rounds that have a file, ascending; with `before`, only those before that round."""
        if not self.folder.is_dir():
            return []
        matches = (_FILE_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        numbers = sorted(int(match[1]) for match in matches if match)
        return [number for number in numbers if before is None or number < before]

    def keys(self, before: int | None = None) -> list[str]:
        """The keys of the files of `rounds(before)`. What `read` returns depends only on them and the capacity.

        Raises:
            DataError: a file belongs to a buffer of another capacity or seed, or earlier rounds changed after it was
                written.
        """
        keys: list[str] = []
        for number in self.rounds(before):
            path = self.path(number)
            file_key = parquet_key(path)
            meta = parquet_meta(path) if file_key is not None else None
            if not isinstance(meta, dict) or "appended_from" not in meta:
                raise DataError(f"{path} is not a file of a replay buffer, or is damaged: remove it")
            if (meta["capacity"], meta["seed"]) != (self.capacity, self.seed):
                raise DataError(
                    f"{path} belongs to a buffer of capacity {meta['capacity']} and seed {meta['seed']}, not "
                    f"{self.capacity} and {self.seed}: set these, append the round again, or use another folder"
                )
            if file_key != self._key(number, meta["appended_from"], keys):
                raise DataError(
                    f"the rounds before {path} changed after it was written, so pairs may be missing from it: append "
                    f"round {number} again"
                )
            keys.append(file_key)
        return keys

    def is_appended(self, round_number: int, key: str, report: Report = no_report) -> bool:
        """Whether `append` of this round with this key would do nothing. A damaged file of the round is set aside.

        Raises:
            DataError: as `keys`, for the earlier rounds.
        """
        return is_kept(self.path(round_number), self._key(round_number, key, self.keys(round_number)), report)

    def append(self, round_number: int, pairs: pl.DataFrame | Iterable[pl.DataFrame], key: str) -> int:
        """Appends the pairs of a round; returns the number of pairs written, which the capacity limits.

        Args:
            round_number: 0 or more. Rounds must be appended in ascending order, because the earlier rounds decide
                which pairs are written.
            pairs: any columns except `round`, `index` and `priority`, the same in every round. The order of the rows
                must be fixed, because it decides the priorities. Of several frames, one after the other, only the rows
                that are written stay in memory.
            key: identifies what `pairs` was made from. A round that was appended with the same key, after the same
                earlier rounds, is not written again; with another key its file is replaced.

        Raises:
            UsageError: the round is below zero, or a column has a reserved name.
            DataError: the columns differ from those of earlier rounds; or as `keys`, for the earlier rounds.
        """
        if round_number < 0:
            raise UsageError(f"the round is {round_number}, but must be zero or more")
        path = self.path(round_number)
        full_key = self._key(round_number, key, self.keys(round_number))
        if intact_key(path) == full_key:
            return parquet_rows(path)
        earlier = [self.path(number) for number in self.rounds(round_number)]
        kept: pl.DataFrame | None = None
        count = 0
        for part in [pairs] if isinstance(pairs, pl.DataFrame) else pairs:
            frame = self._numbered(round_number, part, count)
            count += part.height
            self._check_columns(round_number, frame.schema, earlier)
            frame = frame if kept is None else pl.concat([kept, frame])
            # What is not among the least priorities so far never will be.
            sampled = self._sampled(earlier, frame.select(_BY_PRIORITY))
            kept = frame.join(sampled, on=["round", "index"], how="semi", maintain_order="left")
        if kept is None:
            raise DataError(f"round {round_number} has no pairs to append")
        meta = {
            "appended_from": key,
            "capacity": self.capacity,
            "seed": self.seed,
            "appended": count,
            "written": kept.height,
        }
        write_parquet(path, kept, key=full_key, meta=meta)
        return kept.height

    def _numbered(self, round_number: int, pairs: pl.DataFrame, first: int) -> pl.DataFrame:
        """Pairs with the columns of the buffer; `first`: the index of the first."""
        reserved = [name for name in pairs.columns if name in _RESERVED]
        if reserved:
            raise UsageError(f"column '{reserved[0]}' is reserved by the replay buffer: rename it")
        indices = range(first, first + pairs.height)
        return pairs.with_columns(
            pl.lit(round_number, dtype=pl.UInt32).alias("round"),
            pl.Series("index", indices, dtype=pl.UInt32),
            pl.Series("priority", [priority(self.seed, round_number, i) for i in indices], dtype=pl.UInt64),
        )

    def _check_columns(self, round_number: int, schema: pl.Schema, earlier: list[Path]) -> None:
        if not earlier:
            return
        known = pl.scan_parquet(earlier[0], glob=False).collect_schema()
        if dict(known) != dict(schema):
            raise DataError(
                f"the pairs of round {round_number} have columns {_columns(schema)}, but those of {earlier[0]} have "
                f"{_columns(known)}: every round must have the same columns"
            )

    def read(self, before: int | None = None) -> pl.DataFrame:
        """The pairs of the buffer, sorted by round and index; with `before`, as it was before that round.

        The columns are those appended, `round` (u32), `index` (u32) and `priority` (u64). Without any file the frame
        has no columns.

        Raises:
            DataError: as `keys`.
        """
        self.keys(before)
        files = [self.path(number) for number in self.rounds(before)]
        if not files:
            return pl.DataFrame()
        sampled = self._sampled(files, None)
        pairs = pl.scan_parquet(files, glob=False).join(sampled.lazy(), on=["round", "index"], how="semi")
        return pairs.collect().sort("round", "index")

    def _sampled(self, files: list[Path], new: pl.DataFrame | None) -> pl.DataFrame:
        """`round` and `index` of the pairs of least priority, over `files` and the pairs about to be written."""
        parts = [pl.scan_parquet(files, glob=False).select(_BY_PRIORITY).collect()] if files else []
        parts += [] if new is None else [new]
        return pl.concat(parts).sort(_BY_PRIORITY).head(self.capacity).select("round", "index")

    def _key(self, round_number: int, key: str, earlier: list[str]) -> str:
        return digest("replay buffer", key, round_number, self.capacity, self.seed, earlier)


def priority(seed: int, round_number: int, index: int) -> int:
    """The priority of a pair, uniform below 2^63: from the SHA-256 of (seed, round, index)."""
    return seed_for(seed, "replay buffer", round_number, index)


def _columns(schema: pl.Schema) -> str:
    return ", ".join(f"{name} {dtype}" for name, dtype in schema.items() if name not in _RESERVED)
