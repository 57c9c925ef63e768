"""The process that tells trackers of a run, apart from the run: it follows the run folder, and changes nothing there
but the trackers' own files. Whatever happens to it, the run goes on.

    python -m dice_py.reporting.tracking.process RUN PROCESS TRACKER …

It ends when its standard input does, after a last look. Each line that it prints is a problem; what the trackers print
goes to its standard error.
"""

from __future__ import annotations

import functools
import os
import select
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dice_py.reporting.tracking.records import Follower
from dice_py.reporting.tracking.trackers import TRACKERS, Tracker
from dice_py.runs.stored_config import stored_config

_EVERY = 2.0  # seconds between two looks


def follow(folder: Path, process: int, names: list[str], ended: Callable[[], bool], say: Callable[[str], None]) -> None:
    """Tells the trackers `names` of the run in `folder`, until `ended`, which waits a moment, is true.

    A tracker that fails is left out from then on, and `say` gets a sentence about it.
    """
    config = stored_config(folder)[0].model_dump(mode="json")
    trackers: dict[str, Tracker] = {}

    def attempt(name: str, what: Callable[[], Any]) -> Any:
        try:
            return what()
        except Exception as error:  # of libraries: a tracker never ends a run
            trackers.pop(name, None)
            say(f"train.report_to: {name} failed, and is told no more: {type(error).__name__}: {error}"[:1000])
            return None

    for name in names:
        made = attempt(name, functools.partial(TRACKERS[name], folder, config))
        if made is not None:
            trackers[name] = made
    follower, last = Follower(folder, process), False
    while True:
        for record in follower.poll():
            for name, tracker in list(trackers.items()):
                attempt(name, functools.partial(tracker.add, record))
        if last:
            break
        last = ended()
    for name, tracker in list(trackers.items()):
        attempt(name, tracker.close)


def main() -> None:
    """Follows the run that the arguments name."""
    folder, process, *names = sys.argv[1:]
    answers = os.dup(1)
    os.dup2(2, 1)  # libraries print; a problem must not be lost between their lines

    def say(text: str) -> None:
        os.write(answers, (" ".join(text.split()) + "\n").encode("utf-8", errors="backslashreplace"))

    def ended() -> bool:
        return bool(select.select([0], [], [], _EVERY)[0])

    follow(Path(folder), int(process), names, ended, say)


if __name__ == "__main__":
    main()
