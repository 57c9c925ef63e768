"""The verdict on a reward in one word: usable, length-biased, or at chance. docs/audit.md states the rule."""

from __future__ import annotations

from typing import Literal, NamedTuple

from dice_py.evaluation.audit.preferences import Agreement
from dice_py.evaluation.resampling import Figure, interval
from dice_py.evaluation.slices import CHOSEN_LONGER, CHOSEN_SHORTER

Word = Literal["usable", "length-biased", "at chance"]
HALF = 0.5


class Verdict(NamedTuple):
    """The word, and the figures that it is based on as a sentence without a full stop."""

    word: Word
    reason: str


def over_length(reward: Agreement, length: Agreement) -> Figure:
    """How much more accurate a reward is than length alone, in the direction in which length does better; paired."""
    assert reward.accuracy.value is not None
    assert length.accuracy.value is not None
    longer = length.accuracy.value >= HALF
    best = length.accuracy.value if longer else 1.0 - length.accuracy.value
    drawn = length.resampled if longer else 1.0 - length.resampled
    return Figure(reward.accuracy.value - best, interval(reward.resampled - drawn))


def verdict_of(reward: Agreement, length: Agreement) -> Verdict:
    """The verdict on a reward from its agreement with comparisons, and that of length alone.

    1. At chance: the interval of its accuracy reaches down to one half, or lies below it.
    2. Length-biased: on the comparisons whose better response is the longer one, or on those whose it is the shorter,
       the complete interval of the accuracy lies below one half; or the interval of the length-balanced accuracy
       reaches down to one half, so that beyond length the reward is not known to say anything.
    3. Where fewer than 20 comparisons have the better response longer, or shorter, the second half of 2 cannot be told;
       then the reward must be more accurate than length alone, by the complete interval of the paired difference.
    4. Usable, otherwise.
    """
    low, high = _bounds(reward.accuracy)
    shown = f"accuracy {_shown(reward.accuracy)}"
    if high < HALF:
        return Verdict("at chance", f"{shown}, below one half: are policy and reference swapped, or the labels?")
    if low <= HALF:
        return Verdict("at chance", f"{shown}, which one half is within")
    for name in (CHOSEN_LONGER, CHOSEN_SHORTER):
        one = reward.of(name)
        if one is not None and one["ci95"][1] < HALF:
            of_slice = _shown(Figure(one["accuracy"], one["ci95"]))
            side = "longer" if name == CHOSEN_LONGER else "shorter"
            return Verdict("length-biased", f"{shown}, but {of_slice} where the better response is the {side} one")
    if reward.of(CHOSEN_LONGER) is None or reward.of(CHOSEN_SHORTER) is None:
        more = over_length(reward, length)
        text = f"{_signed(more)} than length alone"
        if _bounds(more)[0] <= 0:
            why = "too few comparisons have the better response longer, or shorter, to tell the two apart"
            return Verdict("length-biased", f"{shown}, not surely more ({text}); {why}")
        return Verdict("usable", f"{shown}, {text}")
    balanced = f"{_shown(reward.balanced)} with longer and shorter better responses weighted equally"
    if _bounds(reward.balanced)[0] <= HALF:
        return Verdict("length-biased", f"{shown}, but {balanced}")
    return Verdict("usable", f"{shown}; {balanced}")


def _bounds(figure: Figure) -> tuple[float, float]:
    assert figure.ci95 is not None
    low, high = figure.ci95
    return low, high


def _shown(figure: Figure) -> str:
    low, high = _bounds(figure)
    return f"{figure.value:.3f} ({low:.3f} to {high:.3f})"


def _signed(figure: Figure) -> str:
    low, high = _bounds(figure)
    return f"{figure.value:+.3f} ({low:+.3f} to {high:+.3f})"
