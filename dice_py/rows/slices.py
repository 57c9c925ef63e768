"""Slices of rows, as datasets writes them: [:1000], [-50:], [10%:20%]."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator

from dice_py.errors import DataError
from dice_py.rows.row import Row

_SLICE = re.compile(r"\[(-?\d+%?)?:(-?\d+%?)?\]")


def bounds(text: str, total: int) -> tuple[int, int]:
    """The first row of a slice and the one behind its last, of `total` rows. Percentages are rounded to whole rows.

    Raises:
        DataError: the text is no slice.
    """
    found = _SLICE.fullmatch(text.replace(" ", ""))
    if found is None:
        raise DataError(f"{text} is no slice; write it as [:1000], [-50:] or [10%:20%]")
    return _at(found[1], 0, total), _at(found[2], total, total)


def _at(end: str | None, default: int, total: int) -> int:
    if end is None:
        return default
    value = int(end.removesuffix("%"))
    if end.endswith("%"):
        if abs(value) > 100:
            raise DataError(f"a slice ends at {end}, but a percentage lies between -100% and 100%")
        value = round(value * total / 100)
    return min(max(value + total, 0) if value < 0 else value, total)


def cut_rows(text: str, rows: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """The rows of a slice. They are counted first only where the slice needs their number.

    Args:
        text: the slice.
        rows: starts to read the rows, from the first one.
    """
    if "-" in text or "%" in text:
        start, stop = bounds(text, sum(1 for _ in rows()))
    else:
        start, stop = bounds(text, 2**62)
    yield from itertools.islice(rows(), start, max(start, stop))
