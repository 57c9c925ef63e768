"""Work of a stage that waits to be interrupted. It imports nothing heavy, since a worker imports it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dice_py.compute.stopping import is_asked_to_stop
from dice_py.errors import StoppedTrainingError


@dataclass(frozen=True)
class Lingering:
    """Writes its process id to `folder/pids`, and works for ten minutes."""

    folder: Path

    def __call__(self, report: Any) -> None:
        (self.folder / "pids").write_text(str(os.getpid()))
        time.sleep(600)


@dataclass(frozen=True)
class Stopping:
    """Writes its process id to `folder/pids`, and stops when it is asked to, after some seconds."""

    folder: Path
    seconds: float

    def __call__(self, report: Any) -> None:
        (self.folder / "pids").write_text(str(os.getpid()))
        while not is_asked_to_stop():
            time.sleep(0.02)
        (self.folder / "asked").write_text("x")
        time.sleep(self.seconds)
        raise StoppedTrainingError("interrupted; its checkpoint is written")
