"""Runs of an ablation that failed: they are named at its end, and do not end the others before."""

from __future__ import annotations

from dice_py.ablation.lanes import PlannedRun
from dice_py.compute.failures import Failure
from dice_py.events import Report

_OF_ALL = {"DiskFullError", "InterruptedRunError"}
"""What would fail in the other runs too, or was meant for all of them."""


class Failures:
    """What failed so far."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        """By the name of the run."""
        self._first: Failure | None = None

    def add(self, one: PlannedRun, failure: Failure, report: Report) -> None:
        """Notes that a run failed.

        Raises:
            DiceError: the failure is one of all runs.
        """
        text = f"{failure.text}. Its folder is {one.folder}"
        if failure.kind in _OF_ALL:
            raise failure.error(f"{one.name}: {text}. The same `dice ablate` continues")
        self.texts[one.name] = text
        self._first = self._first or failure
        report("note", text=f"{one.name} failed: {text}")

    def end(self, rest: str) -> None:
        """Raises the error of the first run that failed, if one did.

        Args:
            rest: a sentence on the other runs.
        """
        if self._first is not None:
            name, text = next(iter(self.texts.items()))
            more = f" ({len(self.texts) - 1} more failed)" if len(self.texts) > 1 else ""
            raise self._first.error(f"{name}: {text}{more}. {rest}")
