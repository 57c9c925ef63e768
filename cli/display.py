"""What a person sees while a stage works: a bar with rate and time left, or plain lines where no terminal is.

Everything here goes to stderr; stdout is for results.
"""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from dice_py.report import number, seconds

PLAIN_EVERY = 10.0  # seconds between two lines of one stage's progress

_HIGHLIGHTS = {
    "generate": ("responses", "response_tokens", "cut_off", "engine"),
    "score": ("responses", "mean_reward", "reward_std"),
    "mine": ("pairs", "alpha", "mean_length_gap_before", "mean_length_gap_after"),
    "replay": ("mined", "replay", "reached_share"),
    "train": ("pairs", "steps", "step0_loss", "final_loss"),
    "evaluate": ("oracle_win_rate", "oracle_accuracy", "mean_response_tokens", "implicit_reward_accuracy"),
}


class Display:
    """Listens to a run's events (`Display.__call__` is a dice_py.artefacts.Report). Use as a context manager."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.quiet = quiet
        self.progress: Progress | None = None
        self.task: TaskID | None = None
        self.shown = ""
        self.began = self.last = time.monotonic()
        self.first = 0

    def __enter__(self) -> Display:
        if self.console.is_terminal and not self.quiet:
            self.progress = Progress(
                TextColumn("  {task.description}"),
                BarColumn(),
                TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}"),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
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
        if self.quiet:
            return
        if event == "progress":
            self._progress(**fields)
        elif event == "note":
            self._line(f"  {fields['text']}")
        elif event == "round":
            self._line(f"round {fields['number']} of {fields['rounds']}")
        elif event == "stage" and fields["status"] != "running":
            self._finish()
            name = fields["stage"].split("/")[-1]
            counts = fields.get("counts") or {}
            told = ", ".join(f"{k.replace('_', ' ')} {number(counts[k])}" for k in _HIGHLIGHTS[name] if k in counts)
            kept = " (kept)" if fields["status"] == "kept" else ""
            self._line(f"  {name:<9} {seconds(fields['seconds']):>10}{kept}  {told}")

    def _line(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False)

    def _finish(self) -> None:
        if self.progress is not None and self.task is not None:
            self.progress.remove_task(self.task)
        self.task, self.shown = None, ""

    def _progress(self, stage: str, done: int, total: int, unit: str) -> None:
        now = time.monotonic()
        if stage != self.shown:
            self._finish()
            self.shown, self.began, self.last, self.first = stage, now, now, done
            if self.progress is not None:
                self.task = self.progress.add_task(stage, total=total, unit=unit, rate="")
        # Shards that a resume kept are done at once: the rate is of what was made since.
        speed = (done - self.first) / (now - self.began) if now > self.began else 0.0
        rate = f"{speed:,.1f} {unit}/s" if speed else ""
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=done, total=total, rate=rate)
        elif now - self.last >= PLAIN_EVERY or (done == total and now - self.began >= PLAIN_EVERY):
            self.last = now
            left = f", {seconds((total - done) / speed)} left" if speed else ""
            self._line(f"  {stage}: {done:,}/{total:,} {unit}, {rate}{left}")


def print_metrics(metrics: dict[str, dict[str, Any]], console: Console) -> None:
    """The evaluation of each round, side by side."""
    names = list(dict.fromkeys(name for found in metrics.values() for name in found))
    table = Table(title="on held-out prompts and pairs", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for name in metrics:
        table.add_column(name, justify="right")
    for name in names:
        table.add_row(name.replace("_", " "), *(number(found.get(name)) for found in metrics.values()))
    console.print(table)
