"""Numbers and names in the columns of a row, checked."""

from __future__ import annotations

import contextlib
import json
import sys
from decimal import Decimal
from typing import Any

from dice_py.errors import DataError
from dice_py.rows.row import Cell


def written(value: Any) -> Any:
    """What a cell of a CSV file writes: a number, a list as JSON, or nothing (None); other values as they are."""
    if isinstance(value, Cell):
        if not value.strip():
            return None
        for kind in (int, float, _list):
            with contextlib.suppress(ValueError, RecursionError):
                return kind(value)
    return value


def _list(text: str) -> list[Any]:
    value = json.loads(text)
    if not isinstance(value, list):
        raise ValueError("no list")
    return value


def whole(value: Any) -> Any:
    """A whole number that Pandas or a database has written as another kind of number; other values as they are."""
    return int(value) if isinstance(value, float | Decimal) and _is_finite(value) and value == int(value) else value


def weight(value: Any, where: str, column: str) -> float:
    """A weight of a row.

    Raises:
        DataError: it is no finite number ≥ 0.
    """
    value = written(value)
    if not _is_finite(value) or value < 0:
        raise DataError(f"{where}: {column!r} must be a finite number ≥ 0, got {value!r:.80}")
    return float(value)


def finite_number(value: Any, where: str, column: str) -> float:
    """A number of a row.

    Raises:
        DataError: it is no number, or is not finite.
    """
    value = written(value)
    if not _is_finite(value):
        raise DataError(f"{where}: {column!r} must be a finite number, got {value!r:.80}")
    return float(value)


def round_number(value: Any, where: str, column: str, current_round: int | None) -> int:
    """The round that made a row's pair.

    Raises:
        DataError: it is no whole number, or is above `current_round`.
    """
    value = whole(written(value))
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**62:
        raise DataError(f"{where}: {column!r} must be a whole number, got {value!r:.80}")
    if current_round is not None and value > current_round:
        raise DataError(
            f"{where}: {column!r} is {value}, but the current round is {current_round}: a pair's age cannot be negative"
        )
    return value


def source_name(value: Any, where: str, column: str) -> str:
    """Where a row's pair is from.

    Raises:
        DataError: it is no text.
    """
    if not isinstance(value, str):
        raise DataError(f"{where}: {column!r} must be text, got {value!r:.80}")
    return value


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return False
    if isinstance(value, Decimal) and not value.is_finite():
        return False
    return -sys.float_info.max <= value <= sys.float_info.max
