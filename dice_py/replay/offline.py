"""`mix_replay` and `sample_replay`: which rows of one frame of offline pairs to replay.

Both work on frames and return row numbers. replay/mix.py chooses from several buffers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import polars as pl

from dice_py.errors import DataError, UsageError
from dice_py.replay.mix import OFFLINE_BUFFER, OfflineBuffer, OnShortfall, StratifyBy, drawn_by_stratum, mix_buffers
from dice_py.replay.sampling import draw
from dice_py.replay.weights import Allocation


@dataclass(frozen=True)
class ReplayMix:
    """Which rows make up a training set, and how close the mix is to the requested one."""

    mined_rows: pl.Series
    """Row numbers of the mined pairs that are kept, ascending (u64)."""
    replay_rows: pl.Series
    """Row numbers of the offline pairs that were drawn, ascending (u64)."""
    candidates: int
    """Offline rows that could have been drawn."""
    requested_share: float
    """The requested gamma."""
    reached_share: float
    """replayed / (mined + replayed); NaN for an empty mix."""
    requested_mined: int
    """Mined rows requested."""
    requested_replay: int
    """Offline rows requested."""
    strata: pl.DataFrame | None = None
    """`stratum`, `candidates` (u64) and `drawn` (u64); None if the draw was not stratified."""

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
        """Rows requested but not available, under `mined` and `replay`."""
        return {"mined": self.requested_mined - self.mined, "replay": self.requested_replay - self.replay}

    def summary(self) -> dict[str, Any]:
        """Counts and shares, ready for JSON."""
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

    With weights, each draw takes a row with probability proportional to its weight among the remaining rows
    (algorithm A-ExpJ: Efraimidis and Spirakis 2006, doi 10.1016/j.ipl.2005.11.003). Rows of weight zero are never
    drawn. replay/weights.py makes weights of margins and ages.

    Args:
        offline_keys: the prompt of each row (integers or text, no nulls).
        n: rows to draw, zero or more.
        seed: 0 to 2**64 - 1.
        exclude: keys of prompts whose rows are excluded.
        weights: one finite number of zero or more per row; None: all rows weigh the same.
        strata: the stratum of each row (integers, booleans or text, no nulls); replay/weights.py has
            `length_buckets`. `n` is divided among the strata, and each stratum is drawn from by weight.
        allocation: "proportional" divides `n` in proportion to the candidates of each stratum (largest remainder).
            "equal" divides it equally; what a stratum lacks is divided among the others.
        on_shortfall: "error", or "record" to return all candidates where there are fewer than `n`.

    Raises:
        UsageError: `n`, `seed` or `allocation` is out of range, or a series differs in length from `offline_keys`.
        DataError: there are fewer than `n` candidates (with `on_shortfall="error"`), a weight is negative or not
            finite, or a key, weight or stratum is null or of a dtype that cannot be used.

    Example:
        >>> import polars as pl
        >>> from dice_py import sample_replay
        >>> prompts = pl.Series([7, 7, 8, 9, 10, 11])
        >>> sample_replay(prompts, 2, seed=0, exclude=pl.Series([7])).to_list()
        [3, 4]
        >>> sample_replay(prompts, 2, seed=0, weights=pl.Series([0.0, 0.0, 0.0, 0.0, 1.0, 3.0])).to_list()
        [4, 5]
        >>> sample_replay(prompts, 9, seed=0, on_shortfall="record").to_list()
        [0, 1, 2, 3, 4, 5]
    """
    if n < 0:
        raise UsageError(f"n is {n}, but must be zero or more")
    drawn = draw(offline_keys, n, seed, exclude=exclude, weights=weights, strata=strata, allocation=allocation)
    if len(drawn.rows) < n and on_shortfall == "error":
        raise DataError(
            f"{n} offline rows were requested, but only {drawn.candidates} of {len(offline_keys)} can be drawn (the "
            "others are on excluded prompts or have weight zero): request fewer, or add offline rows"
        )
    return drawn.rows


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
    stratify_by: StratifyBy = "none",
    allocation: Allocation = "proportional",
    length_column: str = "length",
    length_buckets: int = 4,
    source_column: str = "source",
    total: int | None = None,
    on_shortfall: OnShortfall = "error",
) -> ReplayMix:
    """Chooses the rows of a training set with a share `gamma` of offline pairs (arXiv 2406.09760, section 4.3).

    gamma = replayed / (mined + replayed). Offline rows on any prompt of `mined` are excluded, whether or not its
    mined row is kept. The weight of an offline row is the product of the factors that are set: `weight_column`,
    `margin_power` and `half_life`. `sample_replay` documents the draw.

    Args:
        mined, offline: frames with `key_column`, the prompt of each row (integers or text, no nulls).
        gamma: 0 to 1.
        seed: 0 to 2**64 - 1.
        weight_column: column of `offline` with finite numbers of zero or more.
        margin_power: zero or more; above 0, a factor max(margin, 0)^margin_power of `margin_column`.
        half_life: in rounds, above zero: a factor 2^(-age / half_life), age = `current_round` - `round_column`.
        stratify_by: "length" for `length_buckets` exact quantiles of `length_column` (over all offline rows),
            "source" for the values of `source_column`. Rows are drawn by weight within each stratum.
        allocation: how the count is divided among strata, as for `sample_replay`.
        total: rows of the training set T: round(gamma·T) offline rows, and T minus that many mined rows, drawn
            uniformly. None keeps all M mined rows and adds round(gamma / (1 - gamma)·M) offline rows; with gamma = 1,
            M offline rows and no mined rows. Halves are rounded up.
        on_shortfall: "error", or "record" to use the rows that are available; the result has the shortfall.

    Raises:
        UsageError: an option is out of range.
        DataError: there are too few rows (with `on_shortfall="error"`), a column is missing, or a value cannot be
            used as a key, weight or stratum.

    Example:
        >>> import polars as pl
        >>> from dice_py import mix_replay
        >>> mined = pl.DataFrame({"prompt_id": [0, 1, 2]})
        >>> offline = pl.DataFrame({"prompt_id": [2, 3, 4, 5, 6, 7], "margin": [9.0, 0.5, 0.0, 2.0, 1.0, -1.0]})
        >>> mix = mix_replay(mined, offline, gamma=0.5, seed=0)
        >>> mix.mined_rows.to_list(), mix.replay_rows.to_list(), mix.candidates
        ([0, 1, 2], [2, 3, 4], 5)

        Margins as weights: pairs of a margin of zero or less are never drawn, so three candidates remain.

        >>> mix = mix_replay(mined, offline, gamma=0.75, seed=0, margin_power=1.0, on_shortfall="record")
        >>> offline[mix.replay_rows]["prompt_id"].to_list()
        [3, 5, 6]
        >>> mix.shortfall, mix.reached_share
        ({'mined': 0, 'replay': 6}, 0.5)
    """
    buffer = OfflineBuffer(
        OFFLINE_BUFFER,
        offline,
        weight_column=weight_column,
        margin_power=margin_power,
        half_life=half_life,
        margin_column=margin_column,
        round_column=round_column,
    )
    mix = mix_buffers(
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
        on_shortfall=on_shortfall,
    )
    drawn = mix.draws[OFFLINE_BUFFER]
    return ReplayMix(
        mined_rows=mix.mined_rows,
        replay_rows=drawn.rows,
        candidates=drawn.candidates,
        requested_share=mix.requested_share,
        reached_share=mix.reached_share,
        requested_mined=mix.requested_mined,
        requested_replay=mix.requested[OFFLINE_BUFFER],
        strata=drawn.strata,
    )
