"""An oracle for the penalty of `mine_pairs`: the pairs at any alpha by exact comparison (mine_oracle.py), and the alpha
of the least gap by bisection."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import polars as pl
from mine_oracle import best_first, exact_score, max_min, sides, usable_rows, with_defaults, worst_first


def rank_of(number: float) -> int:
    """The next float of zero or more has the next rank."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


def float_of(rank: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", rank))[0])


def first_float(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The least float of (low, high] for which `holds`, which is false at low, true at high, and turns once."""
    a, b = rank_of(low), rank_of(high)
    while b - a > 1:
        middle = (a + b) // 2
        a, b = (a, middle) if holds(float_of(middle)) else (middle, b)
    return float_of(b)


class Choices:
    """The best of C and the worst of R of each prompt as functions of alpha, by exact comparison."""

    def __init__(self, frame: pl.DataFrame, **options: Any) -> None:
        o = with_defaults(options) | {"debias": "linear"}
        self.rows = usable_rows(frame, o)[0]
        self.o = o
        # Below every break point but that at the least float above zero, from which on the length decides among equal
        # rewards: rewards differ by this at least, lengths by no more.
        shift = max((r.as_integer_ratio()[1].bit_length() - 1 for r in self.rows["r"]), default=0)
        self.tiny = 2.0**-shift / (2 * max(self.rows["l"], default=1) + 1)

    def at(self, alpha: float) -> pl.DataFrame:
        """`p`, `row`, `l`, `row_r`, `l_r`, ascending by prompt."""
        # Nothing changes between the least float above zero and `tiny`.
        exact = exact_score(self.rows, self.tiny if 0 < alpha < self.tiny else alpha)
        c, r = sides(self.rows.with_columns(x=exact), self.o)
        pairs = max_min(best_first(c), worst_first(r), pl.col("r") != pl.col("r_r"))
        return pairs.select("p", "row", "l", "row_r", "l_r").sort("p")

    def gap(self, alpha: float) -> int:
        """Sum of chosen length - rejected length over the prompts."""
        return int(self.at(alpha).select((pl.col("l") - pl.col("l_r")).sum()).item())

    def beyond(self) -> float:
        """An alpha above every break point (lengths differ by one at least)."""
        return 2 * (max(self.rows["r"], default=0.0) - min(self.rows["r"], default=0.0)) + 1

    def least_gap(self) -> int:
        """The gap nearest zero, that of the lower penalty if two are as near: by bisection, as it falls."""
        first, second, last = self.gap(0.0), self.gap(self.tiny), self.gap(self.beyond())
        if first <= 0 or last > 0:
            return first if first <= 0 else last
        if second <= 0:
            return first if first <= abs(second) else second
        at = first_float(lambda a: self.gap(a) <= 0, self.tiny, self.beyond())
        before, after = self.gap(math.nextafter(at, 0)), self.gap(at)
        return before if abs(before) <= abs(after) else after


def assert_step(choices: Choices, low: float, alpha: float, high: float) -> int:
    """[low, high) has alpha and are all floats with the choices of alpha; returns their gap."""
    assert low <= alpha < high
    assert low >= 0
    here = choices.at(alpha)
    last = choices.beyond() if math.isinf(high) else math.nextafter(high, 0)
    for same in (low, last):
        assert choices.at(same).equals(here), f"at {same!r} the pairs are others than at {alpha!r}"
    others = ([math.nextafter(low, 0)] if low > 0 else []) + ([] if math.isinf(high) else [high])
    for other in others:
        assert not choices.at(other).equals(here), f"at {other!r} the pairs are those of {alpha!r}"
    return choices.gap(alpha)


def assert_least_gap(choices: Choices, low: float, alpha: float, high: float) -> None:
    """No alpha has a total gap nearer zero, and no lower one has one as near. The gap falls: two neighbors decide."""
    gap = assert_step(choices, low, alpha, high)
    if gap > 0 and not math.isinf(high):
        # The next step may have the same gap, if only the responses change.
        following = choices.gap(high)
        assert following == gap or -following >= gap, "the next penalty leaves a smaller gap"
    if low > 0:
        assert choices.gap(math.nextafter(low, 0)) > abs(gap), "the penalty before leaves a gap as small"
    assert (low == 0) == (alpha == 0)
