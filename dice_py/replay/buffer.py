"""The replay buffer over rounds: what every round mined, capped by a reservoir, in append-only Parquet files.

One file a round. A pair that is appended gets a random priority from (seed, round, its index), and the buffer is the
`capacity` pairs of least priority over all files: a uniform sample without replacement of everything that was ever
appended, whatever the number of rounds (reservoir sampling: Vitter 1985, doi 10.1145/3147.3165; by priorities:
bottom-k sampling, Cohen and Kaplan 2007, doi 10.1145/1281100.1281133, which is Efraimidis and Spirakis 2006, doi
10.1016/j.ipl.2005.11.003, with equal weights). A pair above the capacity-th priority of its own and the earlier
rounds can never come back into the sample, so it is not written; nothing that was written is written again.

A file's key is a hash of what it was made from and of the keys of all earlier rounds' files. So appending a round
twice does nothing, a round whose input changed is replaced, and a file that was cut by another past is refused.
"""

from __future__ import annotations

import re
from pathlib import Path

import polars as pl

from dice_py.errors import DataError, UsageError
from dice_py.storage.keys import digest, seed_for
from dice_py.storage.parquet import parquet_key, parquet_meta, parquet_rows, write_parquet

_OWN = {"round": pl.UInt32, "index": pl.UInt32, "priority": pl.UInt64}
_ORDER = ["priority", "round", "index"]
_NAME = re.compile(r"round-(\d+)\.parquet")


class ReplayBuffer:
    """At most `capacity` pairs, a uniform sample of all that were appended to `folder`.

    Args:
        folder: holds `round-NN.parquet`; made on the first append. Anything else in it, a killed process's
            temporary files included, is left alone and not read.
        capacity: 1 or more.
        seed: 0 or more; decides the priorities.

    One process may append at a time; any number may read.

    Raises:
        UsageError: capacity or seed out of range.
    """

    def __init__(self, folder: Path, capacity: int, seed: int) -> None:
        if capacity < 1:
            raise UsageError(f"the replay buffer's capacity is {capacity}: give 1 or more")
        if seed < 0:
            raise UsageError(f"the replay buffer's seed is {seed}: give a whole number of zero or more")
        self.folder, self.capacity, self.seed = folder, capacity, seed

    def path(self, round_number: int) -> Path:
        """The file of a round, there or not."""
        return self.folder / f"round-{round_number:02d}.parquet"

    def rounds(self, before: int | None = None) -> list[int]:
        """The rounds that have a file, ascending; with `before`, those earlier than it."""
        if not self.folder.is_dir():
            return []
        found = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        numbers = sorted(int(match[1]) for match in found if match)
        return [number for number in numbers if before is None or number < before]

    def keys(self, before: int | None = None) -> list[str]:
        """The keys of the rounds' files: what `read` gives depends on these, the capacity and nothing else.

        Raises:
            DataError: a file is of another buffer, or was appended after other rounds than are there now.
        """
        keys: list[str] = []
        for number in self.rounds(before):
            path = self.path(number)
            found = parquet_key(path)
            meta = parquet_meta(path) if found is not None else None
            if not isinstance(meta, dict) or "appended_from" not in meta:
                raise DataError(f"{path} is not a file of a replay buffer, or is broken: remove it")
            if (meta["capacity"], meta["seed"]) != (self.capacity, self.seed):
                raise DataError(
                    f"{path} is of a buffer with capacity {meta['capacity']} and seed {meta['seed']}, not "
                    f"{self.capacity} and {self.seed}: give these, append the round again, or take another folder"
                )
            if found != self._key(number, meta["appended_from"], keys):
                raise DataError(
                    f"{path} was appended when the earlier rounds were others than they are now, and was cut by "
                    f"them: append round {number} again"
                )
            keys.append(found)
        return keys

    def holds(self, round_number: int, key: str) -> bool:
        """True if `append` of this round with this key would do nothing.

        Raises:
            DataError: as `keys`, for the earlier rounds.
        """
        return parquet_key(self.path(round_number)) == self._key(round_number, key, self.keys(round_number))

    def append(self, round_number: int, pairs: pl.DataFrame, key: str) -> int:
        """Appends a round's pairs; returns how many were written, those that the capacity leaves room for.

        Args:
            round_number: 0 or more. Rounds are appended in ascending order: a round's file is cut by those of
                the earlier ones.
            pairs: any columns but `round`, `index` and `priority`, the same in every round, in a fixed order of
                rows.
            key: says what `pairs` was made from. The same round with the same key after the same earlier rounds is
                not written again; with another one its file is replaced.

        Raises:
            UsageError: a round below zero, or a column of a reserved name.
            DataError: other columns than the earlier rounds have, or as `keys`, for the earlier rounds.
        """
        if round_number < 0:
            raise UsageError(f"the round is {round_number}: give zero or more")
        reserved = [name for name in pairs.columns if name in _OWN]
        if reserved:
            raise UsageError(f"column '{reserved[0]}' is the replay buffer's own: rename yours")
        path = self.path(round_number)
        earlier = self.keys(round_number)
        full_key = self._key(round_number, key, earlier)
        if parquet_key(path) == full_key:
            return parquet_rows(path)
        files = [self.path(number) for number in self.rounds(round_number)]
        indices = range(pairs.height)
        frame = pairs.with_columns(
            pl.lit(round_number, dtype=pl.UInt32).alias("round"),
            pl.Series("index", indices, dtype=pl.UInt32),
            pl.Series("priority", [priority(self.seed, round_number, i) for i in indices], dtype=pl.UInt64),
        )
        if files:
            known = pl.scan_parquet(files[0], glob=False).collect_schema()
            if dict(known) != dict(frame.schema):
                raise DataError(
                    f"the pairs of round {round_number} have columns {_columns(frame.schema)}, but those of "
                    f"{files[0]} {_columns(known)}: give the same in every round"
                )
        least = self._least(files, frame.select(_ORDER))
        kept = frame.join(least, on=["round", "index"], how="semi", maintain_order="left")
        meta = {
            "appended_from": key,
            "capacity": self.capacity,
            "seed": self.seed,
            "appended": pairs.height,
            "written": kept.height,
        }
        write_parquet(path, kept, key=full_key, meta=meta)
        return kept.height

    def read(self, before: int | None = None) -> pl.DataFrame:
        """The buffer's pairs, by round and index; with `before`, as it was before that round. Empty: no columns.

        Raises:
            DataError: as `keys`.
        """
        self.keys(before)
        files = [self.path(number) for number in self.rounds(before)]
        if not files:
            return pl.DataFrame()
        least = self._least(files, None)
        pairs = pl.scan_parquet(files, glob=False).join(least.lazy(), on=["round", "index"], how="semi")
        return pairs.collect().sort("round", "index")

    def _least(self, files: list[Path], new: pl.DataFrame | None) -> pl.DataFrame:
        """`round` and `index` of the pairs of least priority, over files and what is about to become one."""
        parts = [pl.scan_parquet(files, glob=False).select(_ORDER).collect()] if files else []
        parts += [] if new is None else [new]
        return pl.concat(parts).sort(_ORDER).head(self.capacity).select("round", "index")

    def _key(self, round_number: int, key: str, earlier: list[str]) -> str:
        return digest("replay buffer", key, round_number, self.capacity, self.seed, earlier)


def priority(seed: int, round_number: int, index: int) -> int:
    """The priority of a pair, uniform below 2^63: SHA-256 of (seed, round, index)."""
    return seed_for(seed, "replay buffer", round_number, index)


def _columns(schema: pl.Schema) -> str:
    return ", ".join(f"{name} {dtype}" for name, dtype in schema.items() if name not in _OWN)
