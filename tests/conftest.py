"""What every test runs in, and the fixtures that files share. Helper modules are in tests/support/.

No test reaches the network or the user's cache. Tiny models are made once in a session; tests change copies only.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

# Before torch or a hub is imported. One thread: sums are in one order everywhere, a second thread gains nothing on
# tiny models, and with pytest-xdist each core has a process of its own already.
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

Dice = Callable[..., tuple[int, str, str]]


LONGEST = ("test_embedded_default", "test_own_run", "test_second_round", "test_train_ranks", "test_vllm_resume")
"""Files that are started first, so that none of them is left over when the others are done."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Starts with the files that take longest. With pytest-xdist (`--dist loadfile`) a file stays in one process."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (place.get(item.path.stem, len(LONGEST)), item.path not in slow))


@pytest.fixture(scope="session", autouse=True)
def _session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of the session's own; and spawned processes that import no main module, which is pytest's here."""
    # Stages collect garbage when they release a model. What all files have imported by now need not be searched each
    # time: that would take longer than the tests.
    gc.collect()
    gc.freeze()
    # Under nohup it is ignored, by the processes that tests start too, and tests send it to them.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DICE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(sys.modules["__main__"], "__spec__", None, raising=False)
        patch.delattr(sys.modules["__main__"], "__file__", raising=False)
        yield


@pytest.fixture(scope="module", autouse=True)
def _no_process_is_left() -> Iterator[None]:
    """What a file leaves running would take memory and processor time from all files after it."""
    before = set(multiprocessing.active_children())
    yield
    assert set(multiprocessing.active_children()) <= before


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that is empty at the start of the test. It does not exist yet."""
    monkeypatch.setenv("DICE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def release_models() -> Iterator[None]:
    """Releases, after the test, the models that the process holds."""
    from dice_py.models.loading import release_held

    yield
    release_held()


# --- tiny models ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama (support/tiny_models.py). Read only."""
    from tiny_models import make_llama

    return make_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llama` with other weights. Read only."""
    from tiny_models import make_llama

    return make_llama(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture(scope="session")
def pairs(llama: Path) -> pl.DataFrame:
    """Eight pairs, scored by `llama`: what it can be trained on."""
    from tiny_sets import scored_pairs

    return scored_pairs(llama, 8)


# --- several processes of a training --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """The process that forks ranks: its socket, and its id."""
    from places import SUPPORT, child_environment

    socket = tmp_path_factory.mktemp("f") / "s"
    process = subprocess.Popen(
        [sys.executable, str(SUPPORT / "fork_ranks.py"), str(socket)],
        env=child_environment(OMP_NUM_THREADS="1"),
    )
    try:
        while not Path(f"{socket}.ready").exists():
            assert process.poll() is None, "the process that forks ranks has ended"
            time.sleep(0.05)
        yield str(socket), process.pid
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def forked(forker: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> int:
    """Makes ranks forks. Returns the process id of their parent."""
    from places import SUPPORT

    from dice_py.training import ranks

    launch = ranks.launch

    def from_fork(command: list[str], *rest: Any, **named: Any) -> Any:
        assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
        return launch([sys.executable, str(SUPPORT / "fork_ranks.py"), forker[0], *command[3:]], *rest, **named)

    monkeypatch.setattr(ranks, "launch", from_fork)
    return forker[1]


# --- the command line ----------------------------------------------------------------------------------------


@pytest.fixture
def dice(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Dice:
    """Calls `dice …` in this process, and returns (exit code, stdout, stderr)."""
    from cli.main import main

    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dice", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        assert "\x1b" not in out + err  # no colors or cursor codes where there is no terminal
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    return call


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages of runs and of single commands run in this process, which has torch already."""
    from damage import prepare_nothing, run_inline

    from dice_py.compute import stage_process
    from dice_py.runs import folder

    for module in (stage_process, folder):
        monkeypatch.setattr(module, "run_in_subprocess", run_inline)
    monkeypatch.setattr(stage_process.WarmPool, "prepare", prepare_nothing)


@pytest.fixture
def refused(dice: Dice) -> Callable[..., str]:
    """Calls `dice …`, expects an exit code and one sentence on stderr, and returns the sentence."""

    def call(code: int, *arguments: object) -> str:
        actual, out, err = dice(*arguments)
        assert actual == code, err
        assert out == ""
        sentence = err.strip().splitlines()[-1]
        assert sentence.lower().startswith("error: ")
        return sentence

    return call


@pytest.fixture
def empty_folder(tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, with an empty cache outside it."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder
