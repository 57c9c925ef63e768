"""Work of a stage that waits to be interrupted. It imports nothing heavy, since a worker imports it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Lingering:
    """Writes its process id to `folder/pids`, and works for ten minutes."""

    folder: Path

    def __call__(self, report: Any) -> None:
        (self.folder / "pids").write_text(str(os.getpid()))
        time.sleep(600)
