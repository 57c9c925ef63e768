"""The end of a process's log, for an error's text."""

from __future__ import annotations

import os
from pathlib import Path

_TAIL_BYTES = 2**16  # the part of a log that is searched for its last lines


def log_tail(log: Path, start: int, lines: int) -> str:
    """The last lines of a log, indented; "" if it cannot be read.

    Args:
        start: the offset that the process began to write at.
    """
    try:
        with log.open("rb") as handle:
            end = handle.seek(0, os.SEEK_END)
            handle.seek(max(start, end - _TAIL_BYTES))
            text = handle.read().decode("utf-8", errors="replace").strip().splitlines()
    except OSError:
        return ""
    return "\n".join("    " + line for line in text[-lines:])
