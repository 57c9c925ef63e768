"""Waiting for processes and for what they do. It imports nothing heavy, so that workers may import it too."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE = 60.0
"""Seconds, for a machine that is busy. What is waited for takes a fraction of one."""


def gone(pid: int) -> bool:
    """True once the process has ended. A zombie counts as ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"


def wait_for(condition: Callable[[], object], seconds: float = PATIENCE) -> bool:
    """Whether `condition` becomes true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def has_text(path: Path) -> bool:
    """Whether a file is there and something is written into it."""
    return path.is_file() and path.stat().st_size > 0


def left_in_session(session: int) -> list[int]:
    """Processes of a session that are not yet gone."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, leader = stat.read_text().rpartition(")")[2].split()[:4]
            if int(leader) == session and state not in "ZX":
                found.append(int(stat.parent.name))
    return found
