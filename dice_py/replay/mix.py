"""Which rows make up a training set: mined pairs, and a share gamma of offline ones from several buffers.

gamma = replayed / (mined + replayed), as in DICE (arXiv 2406.09760, section 4.3). Frames in, row numbers out; the
result depends on nothing but the rows, their order, the options and the seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import polars as pl

from dice_py.errors import DataError, UsageError
from dice_py.replay.sampling import MINED, Draw, draw, length_strata, sample
from dice_py.replay.weights import Allocation, proportional_counts, replay_weights
from dice_py.storage.keys import seed_for

Strata: TypeAlias = Literal["none", "length", "source"]
OnShortfall: TypeAlias = Literal["error", "record"]
OFFLINE_BUFFER = "replay"
"""The buffer of data.replay, which draws with the mix's own seed."""
ROUNDS_BUFFER = "rounds"
"""The buffer of what a run's earlier rounds mined."""
_ROW = "__row"


@dataclass(frozen=True)
class OfflineBuffer:
    """One buffer of offline pairs: its rows, its share, and the weights of its rows."""

    name: str
    pairs: pl.DataFrame
    share: float = 1.0
    """Its part of the replayed pairs, relative to the other buffers': 2 and 1 are two thirds and one third."""
    weight_column: str | None = None
    """Numbers of zero or more; None: all rows weigh the same."""
    margin_power: float = 0.0
    """w = max(margin, 0)^margin_power; 0: margins do not count."""
    half_life: float | None = None
    """w = 2^(-age / half_life), in rounds; None: age does not count."""
    margin_column: str = "margin"
    round_column: str = "round"


@dataclass(frozen=True)
class BufferMix:
    """Which rows of the mined pairs and of each buffer make up a training set."""

    mined_rows: pl.Series
    """Row numbers of the mined frame that are kept, ascending (u64)."""
    draws: dict[str, Draw]
    """For each buffer by name, in order: its rows, its candidates and its strata."""
    requested: dict[str, int]
    """Rows asked of each buffer."""
    requested_share: float
    """gamma as asked for."""
    requested_mined: int
    """Mined rows asked for."""

    @property
    def mined(self) -> int:
        """Mined rows kept."""
        return len(self.mined_rows)

    @property
    def replay(self) -> int:
        """Rows drawn of all buffers."""
        return sum(len(found.rows) for found in self.draws.values())

    @property
    def candidates(self) -> int:
        """Rows of all buffers that could have been drawn."""
        return sum(found.candidates for found in self.draws.values())

    @property
    def reached_share(self) -> float:
        """replayed / (mined + replayed); NaN if there is nothing at all."""
        return self.replay / (self.replay + self.mined) if self.replay + self.mined else math.nan

    @property
    def shortfall(self) -> dict[str, int]:
        """Rows that were asked for and are not there: `mined` and `replay`, zero where all are."""
        replay = sum(self.requested.values()) - self.replay
        return {"mined": self.requested_mined - self.mined, "replay": replay}

    def summary(self) -> dict[str, Any]:
        """The counts and shares, ready for JSON: as `ReplayMix.summary`, and `buffers` if there is not just one."""
        reached = self.reached_share
        buffers: dict[str, Any] = {}
        for name, found in self.draws.items():
            buffers[name] = {
                "drawn": len(found.rows),
                "requested": self.requested[name],
                "candidates": found.candidates,
                "shortfall": self.requested[name] - len(found.rows),
            }
            if found.strata is not None:
                buffers[name]["strata"] = drawn_by_stratum(found.strata)
        plain = list(buffers) in ([], [OFFLINE_BUFFER]) and all(found.strata is None for found in self.draws.values())
        return {
            "mined": self.mined,
            "replay": self.replay,
            "candidates": self.candidates,
            "requested_share": self.requested_share,
            "reached_share": None if math.isnan(reached) else reached,
            "shortfall": self.shortfall,
        } | ({} if plain else {"buffers": buffers})


def mix_buffers(
    mined: pl.DataFrame,
    buffers: Sequence[OfflineBuffer],
    *,
    gamma: float,
    seed: int,
    key_column: str = "prompt_id",
    pair_columns: Sequence[str] = ("chosen", "rejected"),
    current_round: int | None = None,
    stratify_by: Strata = "none",
    allocation: Allocation = "proportional",
    length_column: str = "length",
    length_buckets: int = 4,
    source_column: str = "source",
    total: int | None = None,
    on_shortfall: OnShortfall = "error",
) -> BufferMix:
    """Choose the rows of a training set with a share `gamma` of pairs from several buffers.

    How many mined and replayed pairs: as in `mix_replay`. The replayed ones are shared out over the buffers in
    proportion to their shares, by largest remainder (equal remainders: the earlier buffer). The buffers are drawn
    from in the given order. Of each, rows on any prompt of `mined` are left out, and so are pairs (equal in
    `key_column` and `pair_columns`, which only matter with more than one buffer) that an earlier one has given.
    What a buffer lacks is not taken from another.

    Strata and weights: as in `mix_replay`, in every buffer apart; weights are those of each `OfflineBuffer`.

    The buffer named "replay" draws with `seed` itself, so that on its own it gives what `mix_replay` gives; any
    other with a seed made of `seed` and its name, so that neither order nor company changes its random numbers.

    Too few rows: DataError, or with `on_shortfall="record"` all there are, and the shortfall of each buffer in the
    result. No buffers though `gamma` asks for rows, two of one name, or an option out of range: UsageError.
    """
    if not (0.0 <= gamma <= 1.0):
        raise UsageError(f"gamma is {gamma}, but it is the share of replayed pairs: give a number from 0 to 1")
    if total is not None and total < 0:
        raise UsageError(f"total is {total}: give zero or more, or nothing to keep all mined pairs")
    if on_shortfall not in ("error", "record"):
        raise UsageError(f"on_shortfall is {on_shortfall!r}, but must be one of error, record")
    if stratify_by not in ("none", "length", "source"):
        raise UsageError(f"stratify_by is {stratify_by!r}, but must be one of none, length, source")
    names = [buffer.name for buffer in buffers]
    if len(set(names)) < len(names):
        raise UsageError(f"the buffers are named {', '.join(names)}: give each a name of its own")
    for buffer in buffers:
        if not (math.isfinite(buffer.share) and buffer.share > 0.0):
            raise UsageError(f"the share of buffer {buffer.name!r} is {buffer.share}: give a number above zero")
    by = {"length": length_column, "source": source_column}.get(stratify_by)
    for frame, name in ((mined, "mined"), *((buffer.pairs, "offline") for buffer in buffers)):
        needed = {"key_column": key_column} | ({} if by is None or frame is mined else {f"{stratify_by}_column": by})
        for option, column in needed.items():
            if column not in frame.columns:
                raise DataError(
                    f"column '{column}' not found in the {name} pairs; columns are {', '.join(frame.columns)}; "
                    f"name it with {option}="
                )
    want_mined, want_replay = requested_counts(mined.height, gamma, total)
    if want_replay and not buffers:
        raise UsageError(f"gamma is {gamma}, but no buffers are given to replay from")
    requested = dict(zip(names, proportional_counts(want_replay, [b.share for b in buffers]), strict=True))
    row_numbers = pl.arange(mined.height, dtype=pl.UInt64, eager=True)
    mined_rows, _ = sample(row_numbers, want_mined, seed, None, None, MINED)
    draws: dict[str, Draw] = {}
    given: pl.DataFrame | None = None  # what identifies the pairs that earlier buffers gave
    for buffer in buffers:
        try:
            weights = replay_weights(
                buffer.pairs,
                weight_column=buffer.weight_column,
                margin_column=buffer.margin_column,
                margin_power=buffer.margin_power,
                round_column=buffer.round_column,
                half_life=buffer.half_life,
                current_round=current_round,
            )
            labels, spans = None, None
            if stratify_by == "length":
                labels, spans = length_strata(buffer.pairs[length_column], length_buckets)
            elif stratify_by == "source":
                labels = buffer.pairs[source_column]
            identity = _identity(buffer, [key_column, *pair_columns], given) if len(buffers) > 1 else None
            found = draw(
                buffer.pairs[key_column],
                requested[buffer.name],
                seed if buffer.name == OFFLINE_BUFFER else seed_for(seed, "buffer", buffer.name),
                exclude=mined[key_column],
                weights=weights,
                left_out=None if given is None or identity is None else _same(identity, given),
                strata=labels,
                allocation=allocation,
            )
        except DataError as error:
            raise DataError(f"buffer {buffer.name!r}: {error}" if len(buffers) > 1 else str(error)) from None
        if spans is not None and found.strata is not None:
            named = found.strata.with_columns(pl.col("stratum").replace_strict(spans, return_dtype=pl.String))
            found = Draw(found.rows, found.candidates, named)
        draws[buffer.name] = found
        if identity is not None:
            drawn = identity[found.rows]
            given = drawn if given is None else pl.concat([given, drawn])
    mix = BufferMix(
        mined_rows=mined_rows,
        draws=draws,
        requested=requested,
        requested_share=float(gamma),
        requested_mined=want_mined,
    )
    if on_shortfall == "error":
        refuse_shortfall(mix, gamma, mined.height, {buffer.name: buffer.pairs.height for buffer in buffers}, total)
    return mix


def refuse_shortfall(mix: BufferMix, gamma: float, mined: int, heights: dict[str, int], total: int | None) -> None:
    """Raises the DataError for a mix that lacks rows; `mined` and `heights` are the rows that there are."""
    short = {name: mix.requested[name] - len(found.rows) for name, found in mix.draws.items()}
    if not (mix.shortfall["mined"] or any(short.values())):
        return
    told = "".join(
        f"; buffer {name!r} was to give {mix.requested[name]} and has {mix.draws[name].candidates} (of {heights[name]})"
        for name, lacking in short.items()
        if lacking and len(heights) > 1
    )
    raise DataError(
        f"a share of {gamma} takes {mix.requested_mined} mined and {sum(mix.requested.values())} "
        f"offline pairs, but there are {mined} mined ones, and {mix.candidates} offline ones on prompts that were "
        f"not mined (of {sum(heights.values())}){told}: lower gamma{'' if total is None else ' or total'}, give more "
        "offline pairs, or take what there is with on_shortfall='record'"
    )


def _identity(buffer: OfflineBuffer, columns: list[str], given: pl.DataFrame | None) -> pl.DataFrame:
    """What tells the pairs of a buffer apart."""
    for column in columns:
        if column not in buffer.pairs.columns:
            raise DataError(
                f"column '{column}' not found, which tells pairs apart; columns are "
                f"{', '.join(buffer.pairs.columns)}; name such columns with pair_columns="
            )
    identity = buffer.pairs.select(columns)
    for column, dtype in identity.schema.items():
        if given is not None and given.schema[column] != dtype:
            raise DataError(
                f"column '{column}' has dtype {dtype}, but {given.schema[column]} in an earlier buffer, so that pairs "
                "cannot be compared: cast one to the other's"
            )
    return identity


def _same(identity: pl.DataFrame, given: pl.DataFrame) -> pl.Series:
    """True for rows that are among `given`."""
    rows = identity.with_row_index(_ROW).join(given, on=identity.columns, how="semi", nulls_equal=True)[_ROW]
    everything = pl.arange(identity.height, dtype=pl.UInt64, eager=True)
    return everything.is_in(rows.cast(pl.UInt64).implode())


def drawn_by_stratum(strata: pl.DataFrame) -> dict[str, int]:
    return {str(stratum): drawn for stratum, drawn in strata.select("stratum", "drawn").iter_rows()}


def requested_counts(mined: int, gamma: float, total: int | None) -> tuple[int, int]:
    """Rows asked for: mined, replay."""
    if total is not None:
        replay = math.floor(gamma * total + 0.5)
        return total - replay, replay
    if gamma == 1.0:
        return 0, mined
    return mined, math.floor(gamma / (1.0 - gamma) * mined + 0.5)
