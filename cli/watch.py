"""`dice status --watch RUN`: a run as it goes on, in 80 columns; or a line at each change, where it is not a terminal.

It reads the files of the run folder (runs/live.py), so it works for a run of any process, and cannot disturb it.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.live import Live as LiveDisplay
from rich.table import Table
from rich.text import Text

from cli.progress import PLAIN_EVERY, pace_text
from cli.tables import counts_text
from cli.terminal import console, say
from dice_py.reporting.foreign_text import visible
from dice_py.reporting.formatting import number, seconds
from dice_py.runs.live import Live, Watch

EVERY = 1.0  # seconds between two looks
WIDTH = 80
_SPARKS = "▁▂▃▄▅▆▇█"
_PLAIN_SPARKS = "_.-~=+*#"  # for a terminal that is not UTF-8
_SPARK_WIDTH = 36
_BAR_WIDTH = 20
_WARNING_CHARACTERS = 3 * WIDTH

_CURVES = (("loss", "loss"), ("rewards/margins", "margin"))
"""What of the trainer's log is shown, and how it is called."""


def watch_run(folder: Path) -> None:
    """Shows the run in `folder` until it ends, or until Ctrl-C, which ends the watching alone.

    Raises:
        UsageError, DataError: as of `run_status`.
    """
    watch, out = Watch(folder), console()
    try:
        if out.is_terminal:
            _on_terminal(watch, out)
        else:
            _in_lines(watch)
    except KeyboardInterrupt:
        say()


def _on_terminal(watch: Watch, out: Any) -> None:
    sparks = _SPARKS if out.encoding.lower().startswith("utf") else _PLAIN_SPARKS
    live = watch.look()
    with LiveDisplay(view(live, sparks), console=out, auto_refresh=False, vertical_overflow="crop") as display:
        while live.status["state"] == "running":
            time.sleep(EVERY)
            live = watch.look()
            display.update(view(live, sparks), refresh=True)
    for line in _ending(live):
        say(line)


# --- the view -----------------------------------------------------------------------------------------------------


def view(live: Live, sparks: str = _SPARKS) -> Group:
    """What a terminal shows of a run at a moment: at most 80 columns, with the numbers and texts of its files."""
    status = live.status
    parts: list[Any] = [
        _line(f"{status['run']}: {status['state']}, {status['done']} of {status['stages']} stages"),
        _stages(live),
    ]
    if live.progress is not None:
        parts.append(_line(f"{live.progress.stage}: {_bar(live)} {pace_text(live.progress)}"))
    for name, label in _CURVES:
        values = [float(entry[name]) for entry in live.log if name in entry]
        if values:
            where = "" if live.training is None else live.training.split("/")[0]
            now = f"{number(values[0])} → {number(values[-1])}" if len(values) > 1 else number(values[-1])
            parts.append(_line(f"{label:<7} {sparkline(values, _SPARK_WIDTH, sparks)} {now}, {where}"))
    parts += [_line(_gpu(gpu)) for gpu in live.gpus[:8]]
    for text in live.warnings:
        cut = text[:_WARNING_CHARACTERS] + ("…" if len(text) > _WARNING_CHARACTERS else "")
        parts.append(Text(visible(f"warning: {' '.join(cut.split())}"), overflow="fold"))
    return Group(*parts)


def _line(text: str) -> Text:
    """One line of the view, cut at its end."""
    return Text(visible(text).replace("\n", " "), no_wrap=True, overflow="ellipsis")


def _stages(live: Live) -> Table:
    """A row for each stage of the round that is under way, and one for each other round."""
    table = Table(box=None, show_header=False, pad_edge=False, width=WIDTH)
    for name, options in (("stage", {"width": 21}), ("status", {"width": 7}), ("time", {"width": 12})):
        justify = "right" if name == "time" else "left"
        table.add_column(name, justify=justify, no_wrap=True, **options)  # type: ignore[arg-type]
    table.add_column("counts", no_wrap=True, overflow="ellipsis", ratio=1)
    rounds: dict[str, list[dict[str, Any]]] = {}
    for entry in live.status["entries"]:
        rounds.setdefault(entry["stage"].split("/")[0], []).append(entry)
    at_work = current_round(rounds)
    for name, entries in rounds.items():
        if name != at_work:
            done = all(entry["status"] == "done" for entry in entries)
            taken = sum(entry["seconds"] or 0.0 for entry in entries)
            counts = counts_text("evaluate", entries[-1]["counts"]) if done else f"{len(entries)} stages"
            table.add_row(name, "done" if done else "to do", seconds(taken) if done else "–", Text(visible(counts)))
            continue
        for entry in entries:
            counts = counts_text(entry["stage"].split("/")[-1], entry["counts"])
            table.add_row(entry["stage"], entry["status"], seconds(_taken(entry)), Text(visible(counts)))
    return table


def current_round(rounds: dict[str, list[dict[str, Any]]]) -> str:
    """The first round with a stage that is not done; of a finished run the last."""
    unfinished = (name for name, entries in rounds.items() if any(each["status"] != "done" for each in entries))
    return next(unfinished, list(rounds)[-1])


def _taken(entry: dict[str, Any]) -> float | None:
    """Seconds of a stage, up to now while it runs."""
    if entry["status"] == "running" and isinstance(entry["started"], int | float):
        return max(0.0, time.time() - entry["started"])
    taken: float | None = entry["seconds"]
    return taken


def _bar(live: Live) -> str:
    assert live.progress is not None
    share = live.progress.done / live.progress.total if live.progress.total else 0.0
    filled = min(_BAR_WIDTH, max(0, round(share * _BAR_WIDTH)))
    return f"[{'#' * filled}{'-' * (_BAR_WIDTH - filled)}]"


def _gpu(gpu: dict[str, Any]) -> str:
    parts = [f"GPU {gpu['index']}"]
    if gpu.get("mean_utilisation") is not None:
        parts.append(f"{gpu['mean_utilisation']:.0%} busy")
    if gpu.get("peak_memory_bytes") is not None:
        whole = gpu.get("memory_bytes")
        of = "" if whole is None else f" of {whole / 2**30:.0f}"
        parts.append(f"{gpu['peak_memory_bytes'] / 2**30:.1f}{of} GiB at most")
    return ", ".join(parts) + " (last stage)"


def sparkline(values: Iterable[float], width: int, sparks: str = _SPARKS) -> str:
    """The values as one character each, from lowest to highest; where there are more than `width`, means of runs."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    count = min(width, len(finite))
    edges = [len(finite) * at // count for at in range(count + 1)]
    means = [sum(finite[low:high]) / (high - low) for low, high in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    if high == low:
        return sparks[0] * count
    return "".join(sparks[min(len(sparks) - 1, int((mean - low) / (high - low) * len(sparks)))] for mean in means)


# --- lines --------------------------------------------------------------------------------------------------------


def _in_lines(watch: Watch) -> None:
    """A line at each change, as `dice run` prints them."""
    shown: set[str] = set()
    last = -math.inf
    while True:
        live = watch.look()
        lines = [*_changes(live), *(f"  warning: {' '.join(text.split())}" for text in live.warnings)]
        for line in lines:
            if line not in shown:
                shown.add(line)
                say(line)
        if live.status["state"] != "running":
            break
        now = time.monotonic()
        if live.progress is not None and now - last >= PLAIN_EVERY:
            last = now
            say(f"  {live.progress.stage}: {pace_text(live.progress)}{_figures(live)}")
        time.sleep(EVERY)
    status = live.status
    say(f"{status['run']}: {status['state']}, {status['done']} of {status['stages']} stages")
    for line in _ending(live):
        say(line)


def _changes(live: Live) -> list[str]:
    lines = []
    for entry in live.status["entries"]:
        if entry["status"] == "done":
            counts = counts_text(entry["stage"].split("/")[-1], entry["counts"])
            lines.append(f"{entry['stage']}: done, {seconds(entry['seconds'])}  {counts}".rstrip())
        elif entry["status"] == "running":
            lines.append(f"{entry['stage']}: running")
    return lines


def _figures(live: Live) -> str:
    """The last values of the curves, while their training runs."""
    entries = {entry["stage"]: entry for entry in live.status["entries"]}
    if live.training is None or entries[live.training]["status"] != "running":
        return ""
    last = live.log[-1]
    return "".join(f", {label} {number(last[name])}" for name, label in _CURVES if name in last)


def _ending(live: Live) -> list[str]:
    status = live.status
    if status["policy"] is not None:
        return [f"new policy: {status['policy']}"]
    return [f"to go on: dice resume {status['run']}"] if status["state"] == "stopped" else []
