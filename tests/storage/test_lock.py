"""The lock between processes: it is exclusive, it ends with its holder, and a test of it disturbs no process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dice_py.errors import UsageError
from dice_py.storage.lock import exclusive_lock, is_locked

HOLD = """
import sys, time
from pathlib import Path
from dice_py.storage.lock import exclusive_lock
with exclusive_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / ".lock"


@pytest.fixture
def holder(path: Path):
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_another_process_excludes_until_it_is_killed(path: Path, holder: subprocess.Popen[str]) -> None:
    assert is_locked(path)
    assert path.read_text() == str(holder.pid)
    with pytest.raises(BlockingIOError) as caught, exclusive_lock(path, wait=False):
        pass
    assert caught.value.filename == str(path)
    assert path.read_text() == str(holder.pid)  # the one that was refused wrote nothing
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert not is_locked(path)
    with exclusive_lock(path, wait=False):
        assert path.read_text() == str(os.getpid())


def test_waiting_ends_with_the_holder(path: Path, holder: subprocess.Popen[str]) -> None:
    timer = threading.Timer(0.2, holder.kill)
    timer.start()
    started = time.monotonic()
    with exclusive_lock(path):
        assert time.monotonic() - started > 0.1
    timer.join()


def test_a_block_that_fails_releases(path: Path) -> None:
    with pytest.raises(ValueError, match="a bug"), exclusive_lock(path):
        raise ValueError("a bug")
    assert not is_locked(path)


def test_a_file_alone_is_not_a_lock(path: Path) -> None:
    assert not is_locked(path)
    assert not path.exists()  # the test creates no file
    path.write_text("12345678")
    assert not is_locked(path)
    with exclusive_lock(path, wait=False):
        assert path.read_text() == str(os.getpid())
        assert is_locked(path)


def test_a_child_does_not_inherit_it(path: Path) -> None:
    with exclusive_lock(path):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert not is_locked(path)
    finally:
        child.kill()
        child.wait()


def test_testing_the_lock_never_makes_taking_it_fail(path: Path) -> None:
    stop = threading.Event()
    answers: set[bool] = set()

    def ask() -> None:
        while not stop.is_set():
            answers.add(is_locked(path))

    askers = [threading.Thread(target=ask) for _ in range(4)]
    for asker in askers:
        asker.start()
    try:
        for _ in range(500):
            with exclusive_lock(path, wait=False):
                time.sleep(0.0005)
    finally:
        stop.set()
        for asker in askers:
            asker.join()
    assert answers == {True, False}


def test_a_file_that_may_only_be_read(path: Path) -> None:
    path.write_text("1")
    path.chmod(0o444)
    path.parent.chmod(0o555)
    try:
        assert not is_locked(path)
        if os.geteuid():  # root may write anywhere
            with pytest.raises(PermissionError), exclusive_lock(path):
                pass
    finally:
        path.parent.chmod(0o755)


def test_several_takers_at_once_exclude_one_another(path: Path) -> None:
    inside, most, refused = 0, 0, 0
    counted = threading.Lock()

    def take() -> None:
        nonlocal inside, most, refused
        for _ in range(100):
            try:
                with exclusive_lock(path, wait=False):
                    with counted:
                        inside += 1
                        most = max(most, inside)
                    time.sleep(0.0002)
                    with counted:
                        inside -= 1
            except BlockingIOError:
                with counted:
                    refused += 1

    takers = [threading.Thread(target=take) for _ in range(4)]
    for taker in takers:
        taker.start()
    for taker in takers:
        taker.join()
    assert most == 1
    assert refused < 400


def test_a_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "of the user"
    target.write_text("do not touch")
    path.symlink_to(target)
    for wait in (True, False):
        with pytest.raises(UsageError, match="is a symbolic link"), exclusive_lock(path, wait=wait):
            pass
    assert target.read_text() == "do not touch"
    assert not is_locked(path)


def test_a_pipe_is_no_lock(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(UsageError, match="is no file"), exclusive_lock(path):
        pass
    assert not is_locked(path)
