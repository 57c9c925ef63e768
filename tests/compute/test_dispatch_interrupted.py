"""Groups of a driver that is killed or interrupted: none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import group_work
import pytest
from group_dispatch import deal
from places import child_environment
from processes import gone, wait_for


@pytest.mark.parametrize(
    ("which", "number"), [("main", signal.SIGKILL), ("driver", signal.SIGKILL), ("driver", signal.SIGTERM)]
)
def test_groups_end_with_their_driver(tmp_path: Path, which: str, number: signal.Signals) -> None:
    script = tmp_path / "main.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from dice_py.compute.stage_process import run_in_subprocess\n"
        "import functools, group_work\n"
        "folder = Path(sys.argv[1])\n"
        "if __name__ == '__main__':\n"
        "    on_event = lambda event, **fields: None\n"
        "    work = functools.partial(group_work.drive, folder=folder)\n"
        "    run_in_subprocess(work, log=folder / 'worker.log', remedy='', report=on_event)\n"
    )
    command = [sys.executable, str(script), str(tmp_path)]
    main = subprocess.Popen(command, env=child_environment(), stderr=subprocess.DEVNULL)
    try:
        assert wait_for(lambda: len(group_work.lines(tmp_path / "pids")) == 3)
        pids = [int(pid) for pid in group_work.lines(tmp_path / "pids")]
        driver = int(group_work.lines(tmp_path / "driver")[0])
        assert not any(gone(pid) for pid in [driver, *pids])
        os.kill(main.pid if which == "main" else driver, number)
        assert wait_for(lambda: all(gone(pid) for pid in [driver, *pids]))
    finally:
        main.kill()
        main.wait()


def test_an_interrupted_driver_ends_its_groups(tmp_path: Path) -> None:
    def interrupt(event: str, **fields: Any) -> None:
        if event == "note" and len(group_work.lines(tmp_path / "pids")) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        deal(tmp_path, "linger", items=[0, 1, 2], report=interrupt)
    assert all(gone(int(pid)) for pid in group_work.lines(tmp_path / "pids"))
