"""Which rows make up a training set: mined pairs, and a share gamma of replayed pairs from one or more buffers.

gamma = replayed / (mined + replayed), as in DICE (arXiv 2406.09760, section 4.3). Input are frames, output are row
numbers; reading and writing files is the replay stage's (stages/replay.py). The result depends only on the rows,
their order, the options and the seed. For a single buffer, replay/offline.py has the simpler `mix_replay`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import polars as pl

from dice_py.errors import DataError, UsageError
from dice_py.replay.sampling import MINED, Draw, draw, sample
from dice_py.replay.weights import Allocation, length_strata, proportional_counts, replay_weights
from dice_py.storage.keys import seed_for

StratifyBy: TypeAlias = Literal["none", "length", "source"]
OnShortfall: TypeAlias = Literal["error", "record"]
OFFLINE_BUFFER = "replay"
"""Name of the buffer of data.replay, which is drawn with the seed of the mix itself."""
ROUNDS_BUFFER = "rounds"
"""Name of the buffer of pairs that a run mined in earlier rounds."""
_ROW = "__row"


@dataclass(frozen=True)
class OfflineBuffer:
    """A buffer to replay from: its pairs, its share of the replayed pairs, and the weights of its rows."""

    name: str
    pairs: pl.DataFrame
    share: float = 1.0
    """Its part of the replayed pairs, relative to the other buffers: shares of 2 and 1 are two thirds and one third."""
    weight_column: str | None = None
    """Column of finite numbers of zero or more; None: no such factor."""
    margin_power: float = 0.0
    """Exponent of the weight max(margin, 0)^margin_power; 0: margins do not count."""
    half_life: float | None = None
    """Half-life of the weight 2^(-age / half_life), in rounds; None: age does not count."""
    margin_column: str = "margin"
    round_column: str = "round"


@dataclass(frozen=True)
class BufferMix:
    """Which rows of the mined pairs and of each buffer make up a training set."""

    mined_rows: pl.Series
    """Row numbers of the mined pairs that are kept, ascending (u64)."""
    draws: dict[str, Draw]
    """The draw from each buffer, by name, in the order of the buffers."""
    requested: dict[str, int]
    """Rows requested from each buffer, by name."""
    requested_share: float
    """The requested gamma."""
    requested_mined: int
    """Mined rows requested."""

    @property
    def mined(self) -> int:
        """Mined rows kept."""
        return len(self.mined_rows)

    @property
    def replay(self) -> int:
        """Rows drawn, over all buffers."""
        return sum(len(drawn.rows) for drawn in self.draws.values())

    @property
    def candidates(self) -> int:
        """Rows that could have been drawn, over all buffers."""
        return sum(drawn.candidates for drawn in self.draws.values())

    @property
    def reached_share(self) -> float:
        """replayed / (mined + replayed); NaN for an empty mix."""
        return self.replay / (self.replay + self.mined) if self.replay + self.mined else math.nan

    @property
    def shortfall(self) -> dict[str, int]:
        """Rows requested but not available, under `mined` and `replay` (over all buffers)."""
        replay = sum(self.requested.values()) - self.replay
        return {"mined": self.requested_mined - self.mined, "replay": replay}

    def summary(self) -> dict[str, Any]:
        """Counts and shares, ready for JSON.

        The keys are those of `ReplayMix.summary`. `buffers` has the counts of each buffer; it is left out for a
        single unstratified buffer named "replay", and for no buffer.
        """
        reached = self.reached_share
        buffers: dict[str, Any] = {}
        for name, drawn in self.draws.items():
            buffers[name] = {
                "drawn": len(drawn.rows),
                "requested": self.requested[name],
                "candidates": drawn.candidates,
                "shortfall": self.requested[name] - len(drawn.rows),
            }
            if drawn.strata is not None:
                buffers[name]["strata"] = drawn_by_stratum(drawn.strata)
        plain = list(buffers) in ([], [OFFLINE_BUFFER]) and all(drawn.strata is None for drawn in self.draws.values())
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
    stratify_by: StratifyBy = "none",
    allocation: Allocation = "proportional",
    length_column: str = "length",
    length_buckets: int = 4,
    source_column: str = "source",
    total: int | None = None,
    on_shortfall: OnShortfall = "error",
) -> BufferMix:
    """Chooses the rows of a training set with a share `gamma` of pairs from several buffers.

    The numbers of mined and replayed pairs are those of `mix_replay`. The replayed pairs are divided among the
    buffers in proportion to their shares, by largest remainder (the earlier buffer wins ties). Buffers are drawn
    from in the given order. A row is excluded if its prompt is in `mined`, or if an earlier buffer already
    contributed the same pair. Other buffers do not make up for a buffer that has too few rows.

    The buffer named "replay" is drawn with `seed`, so that alone it gives the rows of `mix_replay`. Every other
    buffer is drawn with a seed derived from `seed` and its name, so that neither the order of the buffers nor the
    presence of others changes its random numbers.

    Args:
        mined: the mined pairs; only `key_column` is read.
        buffers: the buffers, with distinct names. Weights are set for each of them.
        gamma, key_column, total: as for `mix_replay`.
        seed: 0 to 2**64 - 1.
        pair_columns: with `key_column`, the columns in which two rows of the same pair are equal. Read only if there
            is more than one buffer.
        current_round: the round from which ages are counted; required by `half_life`.
        stratify_by, allocation, length_column, length_buckets, source_column: as for `mix_replay`, applied to each
            buffer separately.
        on_shortfall: "error", or "record" to use the rows that are available; the result has the shortfall.

    Raises:
        UsageError: an option is out of range, two buffers have the same name, or `gamma` requires replayed rows and
            there are no buffers.
        DataError: there are too few rows (with `on_shortfall="error"`), a column is missing, or a value cannot be
            used as a key, weight or stratum.
    """
    _check_options(buffers, gamma, total, stratify_by, on_shortfall)
    strata = _StrataOptions(stratify_by, allocation, length_column, length_buckets, source_column)
    _check_columns(mined, buffers, key_column, strata)
    requested_mined, requested_replay = requested_counts(mined.height, gamma, total)
    if requested_replay and not buffers:
        raise UsageError(f"gamma is {gamma}, but there are no buffers to replay from: pass buffers, or set gamma to 0")
    counts = proportional_counts(requested_replay, [buffer.share for buffer in buffers])
    row_numbers = pl.arange(mined.height, dtype=pl.UInt64, eager=True)
    mined_rows, _ = sample(row_numbers, requested_mined, seed, None, None, MINED)
    drawn_pairs = _DrawnPairs([key_column, *pair_columns]) if len(buffers) > 1 else None
    draws: dict[str, Draw] = {}
    for buffer, count in zip(buffers, counts, strict=True):
        try:
            draws[buffer.name] = _draw_from(
                buffer,
                count,
                seed if buffer.name == OFFLINE_BUFFER else seed_for(seed, "buffer", buffer.name),
                key_column=key_column,
                mined_keys=mined[key_column],
                current_round=current_round,
                strata=strata,
                drawn_pairs=drawn_pairs,
            )
        except DataError as error:
            raise DataError(f"buffer {buffer.name!r}: {error}" if len(buffers) > 1 else str(error)) from None
    mix = BufferMix(
        mined_rows=mined_rows,
        draws=draws,
        requested={buffer.name: count for buffer, count in zip(buffers, counts, strict=True)},
        requested_share=float(gamma),
        requested_mined=requested_mined,
    )
    if on_shortfall == "error":
        _refuse_shortfall(mix, mined.height, {buffer.name: buffer.pairs.height for buffer in buffers}, total)
    return mix


def requested_counts(mined: int, gamma: float, total: int | None) -> tuple[int, int]:
    """Numbers of mined and replayed rows for a share `gamma` (0 to 1), as `mix_replay` documents them.

    Args:
        mined: rows that were mined.
        total: rows of the training set; None keeps all mined rows.
    """
    if total is not None:
        replay = math.floor(gamma * total + 0.5)
        return total - replay, replay
    if gamma == 1.0:
        return 0, mined
    return mined, math.floor(gamma / (1.0 - gamma) * mined + 0.5)


def drawn_by_stratum(strata: pl.DataFrame) -> dict[str, int]:
    """Rows drawn from each stratum, by its label as text; `strata` as in `Draw`."""
    return {str(stratum): drawn for stratum, drawn in strata.select("stratum", "drawn").iter_rows()}


@dataclass(frozen=True)
class _StrataOptions:
    """How the rows of a buffer are divided into strata, and how a count is divided among the strata."""

    stratify_by: StratifyBy
    allocation: Allocation
    length_column: str
    length_buckets: int
    source_column: str

    @property
    def column(self) -> str | None:
        """The column that decides the stratum of a row."""
        return {"length": self.length_column, "source": self.source_column}.get(self.stratify_by)

    def labels(self, pairs: pl.DataFrame) -> tuple[pl.Series | None, dict[int, str] | None]:
        """The stratum of each row, and the text to show for each stratum where that differs."""
        if self.stratify_by == "length":
            return length_strata(pairs[self.length_column], self.length_buckets)
        return (pairs[self.source_column] if self.stratify_by == "source" else None), None


class _DrawnPairs:
    """The pairs that earlier buffers of a mix contributed, so that no pair is drawn twice."""

    def __init__(self, columns: list[str]) -> None:
        """Two rows are the same pair if they are equal in `columns`."""
        self._columns = columns
        self._drawn: pl.DataFrame | None = None

    def identity(self, pairs: pl.DataFrame) -> pl.DataFrame:
        """The columns that identify a pair.

        Raises:
            DataError: a column is missing, or has another dtype than in an earlier buffer.
        """
        for column in self._columns:
            if column not in pairs.columns:
                raise DataError(
                    f"column '{column}', which identifies pairs, not found; columns are {', '.join(pairs.columns)}; "
                    "name the columns that identify a pair with pair_columns="
                )
        identity = pairs.select(self._columns)
        for column, dtype in identity.schema.items():
            if self._drawn is not None and self._drawn.schema[column] != dtype:
                raise DataError(
                    f"column '{column}' has dtype {dtype}, but {self._drawn.schema[column]} in an earlier buffer, so "
                    "pairs cannot be compared: cast one to the dtype of the other"
                )
        return identity

    def contains(self, identity: pl.DataFrame) -> pl.Series | None:
        """For each row, whether an earlier buffer contributed its pair; None before the first buffer."""
        if self._drawn is None:
            return None
        rows = identity.with_row_index(_ROW).join(self._drawn, on=identity.columns, how="semi", nulls_equal=True)[_ROW]
        return pl.arange(identity.height, dtype=pl.UInt64, eager=True).is_in(rows.cast(pl.UInt64).implode())

    def add(self, identity: pl.DataFrame) -> None:
        """Adds the pairs that a buffer contributed."""
        self._drawn = identity if self._drawn is None else pl.concat([self._drawn, identity])


def _draw_from(
    buffer: OfflineBuffer,
    count: int,
    seed: int,
    *,
    key_column: str,
    mined_keys: pl.Series,
    current_round: int | None,
    strata: _StrataOptions,
    drawn_pairs: _DrawnPairs | None,
) -> Draw:
    """Draws `count` rows of a buffer, or all candidates if there are fewer, and adds them to `drawn_pairs`."""
    weights = replay_weights(
        buffer.pairs,
        weight_column=buffer.weight_column,
        margin_column=buffer.margin_column,
        margin_power=buffer.margin_power,
        round_column=buffer.round_column,
        half_life=buffer.half_life,
        current_round=current_round,
    )
    labels, label_texts = strata.labels(buffer.pairs)
    identity = None if drawn_pairs is None else drawn_pairs.identity(buffer.pairs)
    drawn = draw(
        buffer.pairs[key_column],
        count,
        seed,
        exclude=mined_keys,
        weights=weights,
        excluded_rows=None if drawn_pairs is None or identity is None else drawn_pairs.contains(identity),
        strata=labels,
        allocation=strata.allocation,
    )
    if drawn_pairs is not None and identity is not None:
        drawn_pairs.add(identity[drawn.rows])
    if label_texts is None or drawn.strata is None:
        return drawn
    texts = pl.col("stratum").replace_strict(label_texts, return_dtype=pl.String)
    return Draw(drawn.rows, drawn.candidates, drawn.strata.with_columns(texts))


def _check_options(
    buffers: Sequence[OfflineBuffer], gamma: float, total: int | None, stratify_by: str, on_shortfall: str
) -> None:
    if not (0.0 <= gamma <= 1.0):
        raise UsageError(f"gamma is {gamma}, but it is the share of replayed pairs and must be a number from 0 to 1")
    if total is not None and total < 0:
        raise UsageError(f"total is {total}, but must be zero or more, or None to keep all mined pairs")
    if on_shortfall not in ("error", "record"):
        raise UsageError(f"on_shortfall is {on_shortfall!r}, but must be one of error, record")
    if stratify_by not in ("none", "length", "source"):
        raise UsageError(f"stratify_by is {stratify_by!r}, but must be one of none, length, source")
    names = [buffer.name for buffer in buffers]
    if len(set(names)) < len(names):
        raise UsageError(f"the buffers are named {', '.join(names)}, but every buffer must have a name of its own")
    for buffer in buffers:
        if not (math.isfinite(buffer.share) and buffer.share > 0.0):
            raise UsageError(f"the share of buffer {buffer.name!r} is {buffer.share}, but must be above zero")


def _check_columns(
    mined: pl.DataFrame, buffers: Sequence[OfflineBuffer], key_column: str, strata: _StrataOptions
) -> None:
    for frame, name in ((mined, "mined"), *((buffer.pairs, "offline") for buffer in buffers)):
        columns = {"key_column": key_column}
        if strata.column is not None and frame is not mined:
            columns[f"{strata.stratify_by}_column"] = strata.column
        for option, column in columns.items():
            if column not in frame.columns:
                raise DataError(
                    f"column '{column}' not found in the {name} pairs; columns are {', '.join(frame.columns)}; "
                    f"name it with {option}="
                )


def _refuse_shortfall(mix: BufferMix, mined: int, heights: dict[str, int], total: int | None) -> None:
    """Raises the DataError of a mix that lacks rows; `mined` and `heights` (by buffer) are the rows of the frames."""
    lacking = {name: mix.requested[name] - len(drawn.rows) for name, drawn in mix.draws.items()}
    if not (mix.shortfall["mined"] or any(lacking.values())):
        return
    by_buffer = "".join(
        f"; buffer {name!r} should contribute {mix.requested[name]}, but has {mix.draws[name].candidates} of "
        f"{heights[name]} available"
        for name, count in lacking.items()
        if count and len(heights) > 1
    )
    raise DataError(
        f"a share of {mix.requested_share} takes {mix.requested_mined} mined and {sum(mix.requested.values())} offline "
        f"pairs, but there are {mined} mined pairs, and {mix.candidates} of {sum(heights.values())} offline pairs are "
        f"available (excluded: mined prompts, weights of zero, duplicates){by_buffer}: lower gamma"
        f"{'' if total is None else ' or total'}, add offline pairs, or use what is available with "
        "on_shortfall='record'"
    )
