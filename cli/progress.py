"""Live progress of a stage: a bar with rate and time left on a terminal, else plain lines.

Everything goes to stderr; stdout is for results (cli/tables.py).
"""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.text import Text

from cli.tables import counts_text
from cli.terminal import console, readers_may_leave
from dice_py.reporting.formatting import seconds
from dice_py.runs.progress import Pace, Progress

PLAIN_EVERY = 10.0  # seconds between two lines of one stage's progress


class _Pace(ProgressColumn):
    """Count, rate and time left; "starting" until the stage has reported its total."""

    def render(self, task: Task) -> Text:
        """The column's text."""
        if task.total is None:
            return Text("starting")
        return Text(task.fields["pace"])


def pace_text(progress: Progress) -> str:
    """ "12/40 steps, 2.0/s, 14.0 s left"."""
    left = progress.seconds_left
    rate = f", {progress.per_second:,.1f}/s" if progress.per_second else ""
    time_left = "" if left is None else f", {seconds(left)} left"
    return f"{progress.done:,}/{progress.total:,} {progress.unit}{rate}{time_left}"


class Display:
    """Shows a run's events: a `Report` (events.py) and a context manager."""

    def __init__(self) -> None:
        self.console = console(err=True)
        self.progress: Bars | None = None
        self.task: TaskID | None = None
        self.stage = ""
        self.pace = Pace()
        self.last: float | None = None  # when the last line was printed

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self.progress = Bars(
                TextColumn("  {task.description}", markup=False),
                TimeElapsedColumn(),
                BarColumn(bar_width=24),
                _Pace(),
                console=self.console,
                transient=True,
            )
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress is not None:
            self.progress.stop()

    def __call__(self, event: str, **fields: Any) -> None:
        """Shows one event."""
        if event == "progress":
            self._progress(**fields)
        elif event == "note":
            self.line(f"  {fields['text']}")
        elif event == "warning":
            self.line(f"  warning: {fields['text']}")
        elif event == "round":
            number = fields["number"]
            self.line(f"round {number} of {fields['rounds']}" if number else "round 0: DPO from the SFT model")
        elif event == "stage":
            name = fields["stage"].split("/")[-1]
            if fields["status"] == "running":
                self._begin(name)
            else:
                self._end()
                counts = counts_text(name, fields["counts"])
                took = "kept" if fields["status"] == "kept" else seconds(fields["seconds"])
                self.line(f"  {name:<9} {took:>11}  {counts}")

    def line(self, text: str) -> None:
        """Prints one line, without markup."""
        with readers_may_leave(sys.stderr):
            self.console.print(text, soft_wrap=True)

    def _begin(self, stage: str) -> None:
        self._end()
        self.stage, self.last = stage, None
        self.pace.begin()
        if self.progress is not None:
            self.task = self.progress.add_task(stage, total=None, pace="")

    def _end(self) -> None:
        if self.progress is not None and self.task is not None:
            self.progress.remove_task(self.task)
        self.task, self.stage = None, ""

    def _progress(self, **fields: Any) -> None:
        now = time.monotonic()
        progress = self.pace(**fields)
        if progress.stage != self.stage:
            self._begin(progress.stage)
            progress = self.pace(**fields)
        if self.last is None:
            self.last = now
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=progress.done, total=progress.total, pace=pace_text(progress))
        elif now - self.last >= PLAIN_EVERY:
            self.last = now
            self.line(f"  {progress.stage}: {pace_text(progress)}")
