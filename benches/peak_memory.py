"""Peak resident memory of a process, for benches.

Linux counts in `ru_maxrss` of a process what its parent had in memory when it started it, too. `VmHWM` does not.
"""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

_EVERY = 0.02  # seconds between two looks at a process


def peak_resident_bytes(pid: int) -> int | None:
    """The most bytes that a living process has had in memory; None: it has ended, or the system does not say."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    found = next((line.split()[1] for line in lines if line.startswith("VmHWM:")), None)
    return None if found is None else int(found) * 1024


@dataclass(frozen=True)
class Measured:
    """A command that has ended with code 0."""

    printed: str
    seconds: float
    peak_resident_gib: float


def run_measured(command: list[str]) -> Measured:
    """Runs a command, which prints little, and looks at its memory until it ends.

    Raises:
        SystemExit: it failed, or the system does not tell its memory.
    """
    began, peak = time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        while child.poll() is None:
            peak = max(peak, peak_resident_bytes(child.pid) or 0)
            time.sleep(_EVERY)
        seconds = time.perf_counter() - began
        assert child.stdout is not None
        printed = child.stdout.read()
    if child.returncode != 0:
        raise SystemExit(f"{' '.join(command[:4])} … ended with {child.returncode}")
    if not peak:
        raise SystemExit("this system does not tell the peak memory of a process (/proc/PID/status)")
    return Measured(printed, seconds, peak / 2**30)
