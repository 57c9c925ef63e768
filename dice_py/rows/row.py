"""A row of a user's data, with its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One row of a file. A line that is not a JSON object is a row too: `columns` raises the error."""

    where: str
    """The file and the line or row, as errors name it."""
    place: str
    """The same with a short name of the file, as artifacts keep it."""
    read: Callable[[], dict[str, Any]]

    @property
    def columns(self) -> dict[str, Any]:
        """The values by column.

        Raises:
            DataError: the line is not a JSON object.
        """
        return self.read()


@dataclass(frozen=True)
class Origin:
    """The names of a file, or of a split: the complete one for errors, and a short one for artifacts."""

    full: str
    short: str

    def row(self, place: str, read: Callable[[str], dict[str, Any]]) -> Row:
        """A row at `place`, such as "line 3"; `read` is given the complete name of that place."""
        where = f"{self.full}, {place}"
        return Row(where, f"{self.short}, {place}", lambda: read(where))


class Cell(str):
    """Text of a CSV cell. Where a number is needed, the number that it writes is taken: CSV has no other way."""

    __slots__ = ()
