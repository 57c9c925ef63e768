"""`mix_replay` and `sample_replay`: rows of one file of offline pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import polars as pl

from dice_py.errors import DataError, UsageError
from dice_py.replay.mix import (
    OFFLINE_BUFFER,
    OfflineBuffer,
    OnShortfall,
    Strata,
    drawn_by_stratum,
    mix_buffers,
    refuse_shortfall,
)
from dice_py.replay.sampling import draw
from dice_py.replay.weights import Allocation


@dataclass(frozen=True)
class ReplayMix:
    """Which rows make up a training set, and how near it came to what was asked for."""

    mined_rows: pl.Series
    """Row numbers of the mined frame that are kept, ascending (u64)."""
    replay_rows: pl.Series
    """Row numbers of the offline frame that were drawn, ascending (u64)."""
    candidates: int
    """Offline rows that could have been drawn."""
    requested_share: float
    """gamma as asked for."""
    reached_share: float
    """replayed / (mined + replayed); NaN if there is nothing at all."""
    requested_mined: int
    """Mined rows asked for."""
    requested_replay: int
    """Offline rows asked for."""
    strata: pl.DataFrame | None = None
    """`stratum`, `candidates u64`, `drawn u64`; None where the draw was not stratified."""

    @property
    def mined(self) -> int:
        """Mined rows kept."""
        return len(self.mined_rows)

    @property
    def replay(self) -> int:
        """Offline rows drawn."""
        return len(self.replay_rows)

    @property
    def shortfall(self) -> dict[str, int]:
        """Rows that were asked for and are not there: `mined` and `replay`, zero where all are."""
        return {"mined": self.requested_mined - self.mined, "replay": self.requested_replay - self.replay}

    def summary(self) -> dict[str, Any]:
        """The counts and shares, ready for JSON."""
        return {
            "mined": self.mined,
            "replay": self.replay,
            "candidates": self.candidates,
            "requested_share": self.requested_share,
            "reached_share": None if math.isnan(self.reached_share) else self.reached_share,
            "shortfall": self.shortfall,
        } | ({} if self.strata is None else {"strata": drawn_by_stratum(self.strata)})


def sample_replay(
    offline_keys: pl.Series,
    n: int,
    seed: int,
    *,
    exclude: pl.Series | None = None,
    weights: pl.Series | None = None,
    strata: pl.Series | None = None,
    allocation: Allocation = "proportional",
    on_shortfall: OnShortfall = "error",
) -> pl.Series:
    """Row numbers (u64, ascending) of `n` rows drawn without replacement.

    `offline_keys`: the prompt of each row (integers or text, no nulls). Rows whose key is in `exclude` are
    left out. `weights` (numbers of zero or more): each draw takes a row with probability in proportion to
    its weight among those that are left (algorithm A-ExpJ); rows of weight zero are never drawn
    (replay/weights.py has weights by margin and by age). `seed`: 0 to 2**64 - 1.

    `strata` (integers, booleans or text, no nulls; `dice_py.replay.weights.length_buckets` makes them of lengths):
    `n` is shared out over the strata, "proportional" to the rows that can be drawn of each (largest remainder), or
    "equal", where what a stratum lacks goes to the others. Inside each the rows are drawn by weight.

    Fewer rows than `n`: DataError, or with `on_shortfall="record"` all there are. A weight that is negative,
    NaN, infinite or null, or a null key or stratum: DataError.
    """
    if n < 0:
        raise UsageError(f"n is {n}: give zero or more")
    found = draw(offline_keys, n, seed, exclude=exclude, weights=weights, strata=strata, allocation=allocation)
    if len(found.rows) < n and on_shortfall == "error":
        raise DataError(
            f"{n} offline rows were asked for, but only {found.candidates} can be drawn (of {len(offline_keys)}; "
            "the others are on excluded prompts or have weight zero): ask for fewer or give more offline rows"
        )
    return found.rows


def mix_replay(
    mined: pl.DataFrame,
    offline: pl.DataFrame,
    *,
    gamma: float,
    seed: int,
    key_column: str = "prompt_id",
    weight_column: str | None = None,
    margin_power: float = 0.0,
    margin_column: str = "margin",
    half_life: float | None = None,
    round_column: str = "round",
    current_round: int | None = None,
    stratify_by: Strata = "none",
    allocation: Allocation = "proportional",
    length_column: str = "length",
    length_buckets: int = 4,
    source_column: str = "source",
    total: int | None = None,
    on_shortfall: OnShortfall = "error",
) -> ReplayMix:
    """Choose the rows of a training set with a share `gamma` of offline pairs.

    Both frames have `key_column`, the prompt of each row (integers or text). Offline rows on any prompt of
    `mined`, kept or not, are left out.

    Weights of the offline rows (the product of what is chosen; see `sample_replay` for the draw):

    - `weight_column`: numbers of zero or more;
    - `margin_power` above 0: max(margin, 0)^margin_power, of `margin_column`;
    - `half_life`: 2^(-age / half_life), age = `current_round` - round, of `round_column`.

    `stratify_by`: "length" draws by `length_buckets` exact quantiles of `length_column` (of all offline rows), and
    "source" by the values of `source_column`. `allocation`: see `sample_replay`. Weights hold inside strata.

    `total=None`: all M mined rows, and round(gamma / (1 - gamma) * M) offline ones; gamma = 1: M offline rows
    and no mined ones. `total=T`: round(gamma * T) offline rows, and as many mined ones as make it T, drawn
    uniformly. Halves are rounded up.

    Too few rows: DataError, or with `on_shortfall="record"` all there are, and the shortfall in the result.
    `gamma` outside 0..1 or NaN, or a negative `total`: UsageError.
    """
    if on_shortfall not in ("error", "record"):
        raise UsageError(f"on_shortfall is {on_shortfall!r}, but must be one of error, record")
    buffer = OfflineBuffer(
        OFFLINE_BUFFER,
        offline,
        weight_column=weight_column,
        margin_power=margin_power,
        half_life=half_life,
        margin_column=margin_column,
        round_column=round_column,
    )
    found = mix_buffers(
        mined,
        [buffer],
        gamma=gamma,
        seed=seed,
        key_column=key_column,
        current_round=current_round,
        stratify_by=stratify_by,
        allocation=allocation,
        length_column=length_column,
        length_buckets=length_buckets,
        source_column=source_column,
        total=total,
        on_shortfall="record",
    )
    drawn = found.draws[OFFLINE_BUFFER]
    mix = ReplayMix(
        mined_rows=found.mined_rows,
        replay_rows=drawn.rows,
        candidates=drawn.candidates,
        requested_share=found.requested_share,
        reached_share=found.reached_share,
        requested_mined=found.requested_mined,
        requested_replay=found.requested[OFFLINE_BUFFER],
        strata=drawn.strata,
    )
    if on_shortfall == "error":
        refuse_shortfall(found, gamma, mined.height, {OFFLINE_BUFFER: offline.height}, total)
    return mix
