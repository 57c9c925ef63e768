"""Live progress of a stage: a bar with rate and time left on a terminal, else plain lines.

Everything goes to stderr; stdout is for results (cli/tables.py).
"""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from cli.tables import counts_text
from cli.terminal import console, readers_may_leave
from dice_py.reporting.formatting import seconds

PLAIN_EVERY = 10.0  # seconds between two lines of one stage's progress


class _Pace(ProgressColumn):
    """Count, rate and time left; "starting" until the stage has reported its total."""

    def render(self, task: Task) -> Text:
        """The column's text."""
        if task.total is None:
            return Text("starting")
        return Text(_pace(int(task.completed), int(task.total), task.fields["unit"], task.fields["speed"]))


def _pace(done: int, total: int, unit: str, speed: float) -> str:
    left = f", {seconds((total - done) / speed)} left" if speed and done < total else ""
    return f"{done:,}/{total:,} {unit}" + (f", {speed:,.1f}/s" if speed else "") + left


class Display:
    """Shows a run's events: a `Report` (events.py) and a context manager."""

    def __init__(self) -> None:
        self.console = console(err=True)
        self.progress: Progress | None = None
        self.task: TaskID | None = None
        self.stage = ""
        self.first: int | None = None  # count of the first progress event
        self.began = self.last = 0.0

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self.progress = Progress(
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
        self.stage, self.first = stage, None
        if self.progress is not None:
            self.task = self.progress.add_task(stage, total=None, unit="", speed=0.0)

    def _end(self) -> None:
        if self.progress is not None and self.task is not None:
            self.progress.remove_task(self.task)
        self.task, self.stage = None, ""

    def _progress(self, stage: str, done: int, total: int, unit: str = "rows", step: str | None = None) -> None:
        now = time.monotonic()
        # Each step of a stage goes over the same rows, so it has its own bar.
        stage = stage if step is None else f"{stage} ({step})"
        if stage != self.stage:
            self._begin(stage)
        if self.first is None:
            self.first, self.began, self.last = done, now, now
        # Shards that a resume kept count as done from the start, but not in the rate.
        speed = (done - self.first) / (now - self.began) if now > self.began else 0.0
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=done, total=total, unit=unit, speed=speed)
        elif now - self.last >= PLAIN_EVERY:
            self.last = now
            self.line(f"  {stage}: {_pace(done, total, unit, speed)}")
