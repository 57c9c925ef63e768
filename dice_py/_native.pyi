"""The compiled extension (rust/dice-native): Arrow streams in, Arrow streams out.

Call `dice_py.mine_pairs` and `dice_py.sample_replay` instead; the functions here check less. All of them release the
interpreter while Rust works, read the columns in place, and raise `dice_py.errors.DataError` for data (with the row
number) and `dice_py.errors.UsageError` for options.
"""

from typing import Any, Protocol, final

import pyarrow as pa

__all__ = ["MineSummary", "SegmentMiner", "addresses", "mine", "sample"]

class _ArrowStream(Protocol):
    """Anything that exports its rows by the Arrow PyCapsule interface. A Polars series of structs does so without a
    copy; a Polars frame with several chunks joins them first."""

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object: ...

@final
class MineSummary:
    """The penalty, the statistics and the counts of a mining run."""

    @property
    def alpha(self) -> float | None:
        """The penalty per unit of length, in units of reward; 0.0 for debias "none", None for others but "linear"."""
    @property
    def alpha_low(self) -> float | None:
        """The least penalty with the same best and worst responses; None where `alpha` is."""
    @property
    def alpha_high(self) -> float | None:
        """The penalty from which on they differ; infinity if there is none; None where `alpha` is."""
    @property
    def mean_length_gap_before(self) -> float:
        """Mean of best length - worst length by reward alone; NaN if no response of a prompt beats another."""
    @property
    def mean_length_gap_after(self) -> float:
        """Mean of chosen length - rejected length over the pairs; NaN without pairs."""
    @property
    def correlation_before(self) -> float:
        """Pearson's correlation of reward and length over the usable responses; NaN if one of them is constant."""
    @property
    def correlation_after(self) -> float:
        """The same for score and length."""
    @property
    def curve_alpha(self) -> list[float]:
        """Penalties at which the mean length gap steps, ascending; empty without a linear penalty."""
    @property
    def curve_gap(self) -> list[float]:
        """The mean length gap from each of them to the next."""
    @property
    def curve_exact(self) -> list[bool]:
        """For each of them, whether the gap is that of all prompts, and not of a sample."""
    @property
    def dropped(self) -> list[tuple[str, int]]:
        """(reason, rows), in the order in which the reasons are checked."""
    @property
    def dropped_prompts(self) -> list[tuple[str, int]]:
        """(reason, prompts) of the prompts without a pair."""
    @property
    def tied_pairs(self) -> int:
        """Pairs of equal rewards that were left out, where a prompt can have several pairs."""
    @property
    def prompts(self) -> int:
        """Prompts in the input."""
    @property
    def rows(self) -> int:
        """Rows in the input."""

@final
class SegmentMiner:
    """Mines input that arrives in segments of complete prompts, one after another.

    The calls, in order: `estimate` from a sample (optional); while `needs_pass`: `observe` every segment, then
    `end_pass`; `pairs` of every segment; `summary`. Every stream has the columns of `mine`. The pairs are those of
    `mine` on all segments at once.
    """

    def __new__(cls, options: dict[str, Any]) -> SegmentMiner:
        """A miner with the options of `mine`."""
    def estimate(self, stream: _ArrowStream) -> None:
        """Estimates the penalty from all rows of some of the prompts."""
    def needs_pass(self) -> bool:
        """Whether another pass over all segments is needed before the pairs."""
    def observe(self, stream: _ArrowStream) -> None:
        """Adds a segment to the current pass."""
    def end_pass(self) -> None:
        """Ends a pass, after every segment was observed."""
    def pairs(self, stream: _ArrowStream) -> pa.RecordBatchReader:
        """The pairs of a segment, with the columns of `mine` and row numbers of the segment."""
    def summary(self) -> MineSummary:
        """The summary of all segments passed to `pairs`."""

def mine(stream: _ArrowStream, options: dict[str, Any]) -> tuple[pa.RecordBatchReader, MineSummary]:
    """Mines pairs of a better and a worse response of each prompt.

    Args:
        stream: one row per response, in any order. Columns by name: `prompt` (integers, no nulls), `reward` (f32 or
            f64), `length` (integers from 0 to 2**32 - 1); optional: `truncated` (bool; null counts as false),
            `duplicate` (integers; equal values of a prompt count once), `policy` (integers, no nulls; greater is
            newer), `second` (f32 or f64; a second reward).
        options: every key of `dice_py.mining.options.native_keywords`.

    Returns:
        The pairs, by ascending `prompt`: `prompt`, `chosen_row u64`, `rejected_row u64`, `chosen_reward f32`,
        `rejected_reward f32`, `margin f32`, `chosen_length u32`, `rejected_length u32`; with win rates
        `chosen_win_rate f32` and `rejected_win_rate f32`; with `second` the column `consistency f32`. And the summary.

    Raises:
        DataError: a missing or unsuitable column, a null prompt or policy, a length out of range, or no rows.
        UsageError: an unknown word or a value out of range in `options`.
    """

def addresses(stream: _ArrowStream) -> list[tuple[int, int, int]]:
    """Addresses of the values of (prompt, reward, length) in each batch, as `mine` sees them: for tests that nothing is
    copied."""

def sample(
    offline: _ArrowStream,
    exclude: _ArrowStream,
    *,
    count: int,
    seed: int,
    stream: int,
) -> tuple[pa.RecordBatch, int]:
    """Samples rows of `offline` without replacement: the same rows for the same seed, whatever the chunks.

    Args:
        offline: column `key` (integers, no nulls); optional: column `weight` (f32 or f64, finite, zero or more):
            rows are drawn one after another with probabilities proportional to it.
        exclude: column `key`, of the same type: rows of `offline` with these keys are excluded.
        count: rows to sample, at most.
        seed: the seed of the draw.
        stream: which of several independent draws with that seed.

    Returns:
        Column `row u64`, ascending row numbers of `offline`; and the number of rows that could be drawn (not excluded,
        and of a weight above zero).

    Raises:
        DataError: a missing or unsuitable column, a null, or an unsuitable weight.
    """
