"""Ctrl-C, SIGHUP, SIGTERM and SIGUSR1, once and again, at one process and at a whole terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from places import child_environment
from processes import gone, has_text, wait_for

from dice_py.compute.interrupts import stopped_by_signals

ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

MAIN = """\
import sys, time
from pathlib import Path
from dice_py.compute.stage_process import run_in_subprocess
import cli.main, cli.demo, interrupted_works
if __name__ == "__main__":
    folder, how = Path(sys.argv.pop(1)), sys.argv.pop(1)
    def report(event, **fields): ...
    @cli.main.app.command()
    def work():
        if how == "worker":
            run_in_subprocess(interrupted_works.Lingering(folder), log=folder / "log", remedy="", report=report)
        if how.startswith("asked"):
            _, seconds, grace = how.split()
            stopping = interrupted_works.Stopping(folder, float(seconds))
            run_in_subprocess(stopping, log=folder / "log", remedy="", report=report, grace=float(grace))
        try:
            (folder / "pids").write_text("0")
            time.sleep(600)
        finally:
            (folder / "cleaning").write_text("x")
            time.sleep(600 if how == "slow" else 0)
    cli.main.main()
"""


@pytest.fixture
def started(tmp_path: Path):
    """A `dice` command in a process group of its own, which has begun to work; and the ids of its workers."""
    processes = []

    def start(how: str, *before: str) -> tuple[subprocess.Popen[str], list[int]]:
        script = tmp_path / "main.py"
        script.write_text(MAIN)
        process = subprocess.Popen(
            [*before, sys.executable, str(script), str(tmp_path), how, "work"],
            env=child_environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, process_group=0,
        )  # fmt: skip
        processes.append(process)
        assert wait_for(lambda: has_text(tmp_path / "pids"))
        return process, [int(pid) for pid in (tmp_path / "pids").read_text().split() if pid != "0"]

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", ALL)
def test_a_stage_that_is_stopped(started, number: signal.Signals) -> None:
    process, workers = started("worker")
    assert len(workers) == 1
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 5
    assert said == "error: interrupted; completed shards are kept: repeat the command to continue\n"
    assert all(gone(pid) for pid in workers)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_the_signal_of_a_terminal_or_a_job_step_that_reaches_all_processes(started, number: signal.Signals) -> None:
    process, workers = started("worker")
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 5
    assert said == "error: interrupted; completed shards are kept: repeat the command to continue\n"
    assert all(gone(pid) for pid in workers)


@pytest.mark.parametrize(("first", "second"), [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGHUP)])
def test_a_second_signal_does_not_wait(started, tmp_path: Path, first: signal.Signals, second: signal.Signals) -> None:
    process, _ = started("slow")
    process.send_signal(first)
    assert wait_for(lambda: has_text(tmp_path / "cleaning"))
    process.send_signal(second)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 5
    assert said.startswith("error: interrupted again: stopped at once; completed files are kept")
    assert len(said.splitlines()) == 1


STOPPED = "error: interrupted; its checkpoint is written: repeat the command to continue\n"
INTERRUPTED = "error: interrupted; completed shards are kept: repeat the command to continue\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_work_that_can_stop_is_asked_to(started, tmp_path: Path, number: signal.Signals) -> None:
    process, workers = started("asked 0.2 60")
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (5, STOPPED)
    assert (tmp_path / "asked").exists()
    assert all(gone(pid) for pid in workers)


def test_ctrl_c_does_not_ask(started, tmp_path: Path) -> None:
    process, workers = started("asked 0 60")
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (5, INTERRUPTED)
    assert not (tmp_path / "asked").exists()
    assert all(gone(pid) for pid in workers)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT, None])
def test_a_second_signal_or_the_end_of_the_time_ends_it(started, tmp_path: Path, second: signal.Signals | None) -> None:
    process, workers = started(f"asked 600 {600 if second else 1.5}")
    process.send_signal(signal.SIGUSR1)
    assert wait_for(lambda: has_text(tmp_path / "asked"))
    if second is not None:
        process.send_signal(second)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (5, INTERRUPTED)
    assert all(gone(pid) for pid in workers)


def test_a_signal_through_a_shell_that_becomes_the_program(started, tmp_path: Path) -> None:
    process, _ = started("asked 0 60", "sh", "-c", 'exec "$0" "$@"')
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (5, STOPPED)


def test_nohup_is_left_alone(started) -> None:
    process, workers = started("worker", "nohup")
    process.send_signal(signal.SIGHUP)
    assert not gone(process.pid)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 5
    assert all(gone(pid) for pid in workers)


def test_handlers_are_put_back_and_blocks_may_be_inside_each_other() -> None:
    before = [signal.getsignal(number) for number in ALL]
    with stopped_by_signals():
        inside = [signal.getsignal(number) for number in ALL]
        with stopped_by_signals():
            assert [signal.getsignal(number) for number in ALL] == inside
        assert [signal.getsignal(number) for number in ALL] == inside
        assert inside[1] != before[1]
    assert [signal.getsignal(number) for number in ALL] == before


def test_outside_the_main_thread_nothing_is_handled() -> None:
    seen = []

    def work() -> None:
        with stopped_by_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


_AT_THE_END = """
import os, signal
class Late:
    def __del__(self, kill=os.kill, own=os.getpid(), number=signal.SIGTERM):
        kill(own, number)
late = Late()  # deleted with its module, when Python has put the system's handlers back
from dice_py.compute.interrupts import stopped_by_signals
try:
    with stopped_by_signals():
        os.kill(os.getpid(), signal.SIGTERM)
except KeyboardInterrupt:
    raise SystemExit(5)
"""


def test_a_signal_at_the_very_end_does_not_change_the_exit_code() -> None:
    ended = subprocess.run([sys.executable, "-c", _AT_THE_END], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (5, "")


_AFTER_THE_END = """
import atexit, os, signal, sys, time
from dice_py.compute.interrupts import settle, stopped_by_signals
def signalled():
    os.kill(os.getpid(), signal.{name})
    time.sleep(60)
atexit.register(signalled)
with stopped_by_signals():
    settle(3)
    {at_once}
sys.exit(3)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
@pytest.mark.parametrize("at_once", ["signalled()", "pass"])
def test_a_signal_after_the_work_ends_the_process_at_once_with_its_exit_code(name: str, at_once: str) -> None:
    code = _AFTER_THE_END.format(name=name, at_once=at_once)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=50)
    assert (ended.returncode, ended.stderr) == (3, "")
