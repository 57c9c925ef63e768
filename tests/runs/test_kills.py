"""Kills a small run at random moments, resumes it, and compares it with a run that nobody disturbed.

`make test-kills` sets DICE_KILLS=100. The moments are seeded: DICE_KILLS_SEED takes others.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from damage import assert_same_results, prepare_nothing, run_inline
from own_run import own_config
from places import child_environment
from processes import left_in_session, wait_for
from tiny_models import make_mistral

from cli.output import pages
from dice_py.compute.stage_process import WarmPool
from dice_py.config.loading import dump
from dice_py.config.run import RunConfig
from dice_py.events import no_report
from dice_py.runs import folder as run_folder
from dice_py.runs import loop
from dice_py.runs.event_log import read_events
from dice_py.runs.verify import verify_run

pytestmark = [pytest.mark.slow, pytest.mark.long]

KILLS = int(os.environ.get("DICE_KILLS", "5"))
SEED = int(os.environ.get("DICE_KILLS_SEED", "0"))
PER_RUN = 5
"""Kills of one run, one after another."""
LATER_SECONDS = 1.0
"""A kill comes up to so long after the event that it waits for, so that it can hit any line of the program."""


def kill_group(process: subprocess.Popen[bytes], rng: random.Random) -> None:
    os.killpg(process.pid, signal.SIGKILL)


def kill_main(process: subprocess.Popen[bytes], rng: random.Random) -> None:
    process.kill()


def kill_worker(process: subprocess.Popen[bytes], rng: random.Random) -> None:
    """One process of the run other than the main one; the main one where there is none."""
    others = sorted(set(left_in_session(process.pid)) - {process.pid})
    with contextlib.suppress(ProcessLookupError):
        os.kill(rng.choice(others or [process.pid]), signal.SIGKILL)


def terminate(process: subprocess.Popen[bytes], rng: random.Random) -> None:
    process.terminate()


def interrupt(process: subprocess.Popen[bytes], rng: random.Random) -> None:
    process.send_signal(signal.SIGINT)


WAYS: list[Callable[[subprocess.Popen[bytes], random.Random], None]] = [
    kill_group,
    kill_main,
    kill_worker,
    terminate,
    interrupt,
]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    rounds = 1 if KILLS <= PER_RUN else 2
    # Two rounds where there is time.
    return own_config(tmp_path_factory.mktemp("own"), make_mistral, f"rounds={rounds}", "replay.buffer.capacity=50")


@pytest.fixture(scope="module")
def undisturbed(own: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "run_in_subprocess", run_inline)
        patch.setattr(WarmPool, "prepare", prepare_nothing)
        loop.run(own, folder, after_round=pages(no_report))
    return folder


def start(folder: Path, config: Path, log: Path) -> subprocess.Popen[bytes]:
    begun = (folder / "config.yaml").exists()
    asked = ["resume", str(folder)] if begun else ["run", "-c", str(config), "--run-dir", str(folder)]
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "cli.main", *asked],
            stdout=output,
            stderr=output,
            env=child_environment(),
            start_new_session=True,
        )


def shards(folder: Path) -> dict[Path, int]:
    """The shards that are whole, with the time at which each was written."""
    found = [*folder.glob("round-*/generate/generations-*.parquet"), *folder.glob("round-*/score/scores-*.parquet")]
    return {file: file.stat().st_mtime_ns for file in found}


@pytest.mark.parametrize("number", range((KILLS + PER_RUN - 1) // PER_RUN))
def test_a_run_killed_at_random_moments_ends_as_an_undisturbed_one(
    own: RunConfig, undisturbed: Path, tmp_path: Path, number: int
) -> None:
    rng = random.Random(f"{SEED} {number}")
    config, folder, log = tmp_path / "config.yaml", tmp_path / "run", tmp_path / "output"
    config.write_text(dump(own))
    events = len(read_events(undisturbed / "events.jsonl"))
    ways = rng.sample(WAYS, PER_RUN)
    written: dict[Path, int] = {}
    for kill in range(min(PER_RUN, KILLS - PER_RUN * number)):
        # Later and later, since a stage that is kept has few events.
        target = len(read_events(folder / "events.jsonl")) + rng.randrange(1, 2 + events // PER_RUN)
        later = rng.uniform(0, LATER_SECONDS)
        process = start(folder, config, log)

        def is_due(target: int = target, process: subprocess.Popen[bytes] = process) -> bool:
            return process.poll() is not None or len(read_events(folder / "events.jsonl")) >= target

        assert wait_for(is_due, seconds=300)
        time.sleep(later)
        if process.poll() is None:
            ways[kill](process, rng)
        process.wait(300)
        # 1 would be a bug: a worker that was killed is told as such, with the code of a lack of memory.
        assert process.returncode in (0, 4, 5, -signal.SIGKILL, -signal.SIGINT), log.read_text()[-3000:]
        assert wait_for(lambda process=process: not left_in_session(process.pid), seconds=60)
        assert {file: file.stat().st_mtime_ns for file in written} == written  # nothing that was whole is made again
        written |= shards(folder)
    process = start(folder, config, log)
    assert process.wait(300) == 0, log.read_text()[-3000:]
    assert {file: file.stat().st_mtime_ns for file in written} == written
    assert_same_results(folder, undisturbed)
    assert not list(folder.rglob("*.damaged*"))
    found = verify_run(folder)
    assert (found["damaged"], found["missing"]) == ([], [])
