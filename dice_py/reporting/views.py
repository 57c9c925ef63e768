"""What the page's templates show: tables and figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from markupsafe import Markup


NOT_OURS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)
"""Errors of reading an artifact that is whole, but whose content dice did not write."""


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row is its heading."""

    caption: str
    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Figure:
    """A plot with its title above it, what it shows in words, and the numbers behind it."""

    title: str
    svg: Markup
    """With the description as its text alternative."""
    note: str = ""
    table: Table | None = None
