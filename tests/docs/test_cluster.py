"""The batch script of docs/cluster.md, with stand-ins for dice and scontrol: what it calls, and when it requeues."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT
from processes import has_text, wait_for

SCRIPT = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", (ROOT / "docs/cluster.md").read_text(encoding="utf-8"), re.S)[0]
DICE = """#!/bin/bash
echo "$@" >> "$PLACE/calls"
mkdir -p "$RUN"; touch "$RUN/config.yaml"
[ -z "$CODE" ] || exit "$CODE"
stop() { echo "$1" >> "$PLACE/signals"; sleep 0.5; exit 5; }
trap 'stop USR1' USR1
trap 'stop TERM' TERM
echo ready > "$PLACE/ready"
while true; do sleep 0.05; done
"""
SCONTROL = """#!/bin/bash
echo "$@" >> "$PLACE/requeued"
"""


class Job:
    """The script in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "a run"
        for name, text in (("dice", DICE), ("scontrol", SCONTROL), ("job", SCRIPT)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, code: str = "") -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "PLACE": str(self.folder),
            "RUN": str(self.run),
            "CODE": code,
            "SLURM_JOB_ID": "17",
        }
        (self.folder / "ready").unlink(missing_ok=True)
        process = subprocess.Popen([self.folder / "job"], env=environment, process_group=0)
        self.processes.append(process)
        return process

    def lines(self, name: str) -> list[str]:
        file = self.folder / name
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    made = Job(tmp_path)
    yield made
    for process in made.processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_it_is_a_script(tmp_path: Path) -> None:
    (tmp_path / "job").write_text(SCRIPT)
    subprocess.run(["bash", "-n", tmp_path / "job"], check=True)


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_signal_is_passed_on_and_the_job_requeued(job: Job, name: str) -> None:
    process = job.start()
    assert wait_for(lambda: has_text(job.folder / "ready"))
    process.send_signal(signal.Signals[f"SIG{name}"])
    assert process.wait(30) == 5
    assert job.lines("signals") == [name]
    assert job.lines("requeued") == ["requeue 17"]
    assert job.start("0").wait(30) == 0
    first, second = job.lines("calls")
    assert first == f"run --config run.yaml --run-dir {job.run} --set rounds.grace_seconds=100"
    assert second == f"resume {job.run} --set rounds.grace_seconds=100"
    assert len(job.lines("requeued")) == 1


@pytest.mark.parametrize("code", [0, 3, 5])
def test_without_a_signal_it_is_not_requeued(job: Job, code: int) -> None:
    assert job.start(str(code)).wait(30) == code
    assert job.lines("requeued") == []
