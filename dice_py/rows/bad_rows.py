"""What happens to a row that cannot be used: an error, or it is left out and counted (data.on_bad_row)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dice_py.errors import DataError
from dice_py.events import Report, no_report

SHOWN = 5
"""Places that a summary names."""
_REMEDY = "; to leave such rows out: --set data.on_bad_row=skip"


@dataclass(frozen=True)
class BadRowRule:
    """The settings data.on_bad_row and data.max_bad_rows."""

    on_bad_row: Literal["error", "skip"] = "error"
    max_share: float = 0.25
    """More skipped rows than this share of a file are an error."""


class BadRows:
    """The rows of one file that could not be used, in the order in which they were met.

    Args:
        rule: what happens to them.
        source: the file, as messages name it.
        noun: what its rows are.
    """

    def __init__(self, rule: BadRowRule, source: str, noun: str = "rows") -> None:
        self.rule, self.source, self.noun = rule, source, noun
        self.reasons: list[str] = []
        self.total = 0
        """Rows met, the bad ones included."""

    @contextlib.contextmanager
    def row(self) -> Iterator[None]:
        """Around the work on one row. Under "skip", a DataError of it is kept as a reason.

        Raises:
            DataError: under "error"; the message names the setting that leaves the row out.
        """
        self.total += 1
        try:
            yield
        except DataError as error:
            if self.rule.on_bad_row == "error":
                raise DataError(f"{error}{_REMEDY}") from None
            self.reasons.append(str(error))

    def finish(self, report: Report = no_report) -> None:
        """Reports what was skipped.

        Raises:
            DataError: more rows were bad than data.max_bad_rows allows.
        """
        if not self.reasons:
            return
        listed = "; ".join(self.reasons[:SHOWN])
        more = "" if len(self.reasons) <= SHOWN else f"; and {len(self.reasons) - SHOWN} more"
        share = f"{len(self.reasons)} of {self.total} {self.noun}"
        if len(self.reasons) > self.rule.max_share * self.total:
            raise DataError(
                f"{self.source}: {share} cannot be used, more than data.max_bad_rows ({self.rule.max_share:g}) "
                f"allows: {listed}{more}"
            )
        report("note", text=f"{self.source}: {share} skipped (data.on_bad_row=skip): {listed}{more}")
