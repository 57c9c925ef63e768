"""Work of ranks in tests of training/launcher.py, without torch; and a launcher of two ranks.

python rank_works.py ADDRESS    starts two ranks as torchrun does, and stops one when the other fails
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dice_py.errors import DataError

if TYPE_CHECKING:
    from dice_py.events import Report

RANKS = 2


def _rank() -> int:
    return int(os.environ["RANK"])


def answer(report: Report, start: int) -> int:
    """Reports its rank, and returns `start` plus its rank."""
    report("note", text=f"rank {_rank()}")
    print(f"rank {_rank()} prints, FLAVOUR is {os.environ.get('FLAVOUR')}", flush=True)
    print(f"MALLOC_TRIM_THRESHOLD_ is {os.environ.get('MALLOC_TRIM_THRESHOLD_')}", flush=True)
    return start + _rank()


def fail(report: Report, how: str, rank: int = 1) -> None:
    """Rank `rank` fails; the other one waits."""
    if _rank() != rank:
        sleep(report)
    if how == "data":
        raise DataError("row 7 is bad")
    if how == "memory":
        raise MemoryError("no room for 3 tensors")
    if how == "bug":
        raise ZeroDivisionError("seven by nought")
    if how == "interrupt":
        raise KeyboardInterrupt
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    print("last words", flush=True)
    os._exit(3)


def fail_in_turn(report: Report) -> None:
    """Rank 0 fails first, with a consequence; rank 1 fails with the cause."""
    if _rank() == 0:
        raise RuntimeError("connection reset by peer")
    time.sleep(0.3)
    raise DataError("row 7 is bad")


def exit_silently(report: Report) -> str:
    """Rank 0 returns a value; rank 1 exits with 0, but without a result."""
    if _rank() == 1:
        os._exit(0)
    return "value"


class _Unloadable:
    """Work that is pickled in the stage, and whose module a rank cannot import."""

    def __call__(self, report: Report) -> None:
        raise AssertionError("it cannot be unpickled")

    def __reduce__(self) -> Any:
        return load_library, ()


def load_library() -> None:
    """Fails as the import of a library with a missing file does."""
    raise OSError("libmissing.so: cannot open shared object file")


unloadable = _Unloadable()


def sleep(report: Report, folder: str | None = None) -> None:
    """Creates a file named after its process id in `folder`, and sleeps, with an event each second."""
    if folder is not None:
        Path(folder, str(os.getpid())).touch()
    for second in range(600):
        report("progress", done=second)
        time.sleep(1)


def main() -> None:
    command = [sys.executable, "-m", "dice_py.training.launcher", sys.argv[1]]
    ranks = [
        subprocess.Popen(command, env={**os.environ, "RANK": str(rank)}, start_new_session=True)
        for rank in range(RANKS)
    ]
    while None in [rank.poll() for rank in ranks]:
        time.sleep(0.02)
        if any(rank.returncode for rank in ranks):
            time.sleep(0.5)
            for rank in ranks:
                rank.terminate()
    sys.exit(any(rank.returncode for rank in ranks))


if __name__ == "__main__":
    main()
