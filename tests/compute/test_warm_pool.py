"""Processes that are started before their work is known: who takes them, and that none is left behind."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import group_work
import pytest
import worker_works as works
from places import child_environment
from processes import PATIENCE, gone, has_text, wait_for

from dice_py.compute.stage_process import WarmPool, run_in_subprocess
from dice_py.compute.worker import Worker
from dice_py.errors import OutOfMemoryError
from dice_py.events import Report, no_report

REMEDY = "lower some.budget"


def workers() -> set[int]:
    """The ids of this process's workers."""
    return {process.pid for process in multiprocessing.active_children() if process.pid is not None}


@pytest.fixture
def children() -> Callable[[], set[int]]:
    """The ids of the workers that the test has started and that are alive."""
    before = workers()
    return lambda: workers() - before


@pytest.fixture
def pool() -> Iterator[WarmPool]:
    with WarmPool() as there:
        yield there


@pytest.fixture
def in_warm(tmp_path: Path) -> Callable[..., Any]:
    """Runs `group_work.whoami` in the warm process, or in a new one: its answer."""

    def run(warm: Worker | None, report: Report = no_report) -> Any:
        work, log = group_work.whoami, tmp_path / "worker.log"
        return run_in_subprocess(work, log=log, remedy=REMEDY, report=report, warm=warm)

    return run


MODULES = ["json", "group_work"]


def test_a_stage_works_in_the_spare(pool: WarmPool, in_warm, tmp_path: Path) -> None:
    pool.prepare(MODULES, log=tmp_path / "spare.log")
    pool.prepare(MODULES)  # one is enough
    assert wait_for(lambda: (tmp_path / "spare.log").exists() and "imported" in (tmp_path / "spare.log").read_text())
    assert pool.take(["another"]) is None
    warm = pool.take(MODULES)
    assert warm is not None
    assert pool.take(MODULES) is None  # it is given away
    heard: list[tuple[str, dict[str, Any]]] = []
    found = in_warm(warm, report=lambda event, **fields: heard.append((event, fields)))
    assert found["pid"] == warm.pid != os.getpid()
    assert [event for event, _ in heard] == ["note", "process"]
    assert (tmp_path / "spare.log").read_text() == "group_work is imported\n"
    assert (tmp_path / "worker.log").read_text() == "printed by the work\n"
    seconds = heard[-1][1]["seconds"]
    assert seconds["total"] == pytest.approx(sum(seconds.values()) - seconds["total"], abs=0.005)
    assert all(value >= 0 for value in seconds.values())
    assert gone(warm.pid)


def test_a_spare_that_is_not_done_yet_goes_on_with_the_work(pool: WarmPool, in_warm) -> None:
    pool.prepare(MODULES)
    warm = pool.take(MODULES)
    assert warm is not None
    assert in_warm(warm)["pid"] == warm.pid


def test_a_spare_works_in_the_environment_of_its_work(pool: WarmPool, in_warm, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = "PYTORCH_NVML_BASED_CUDA_CHECK"
    monkeypatch.delenv(nvml, raising=False)
    monkeypatch.setenv("FOR_A_WHILE", "1")
    pool.prepare(MODULES)
    monkeypatch.delenv("FOR_A_WHILE")
    monkeypatch.setenv("SINCE_THEN", "2")
    found = in_warm(pool.take(MODULES))
    assert found["at_import"][nvml] == "1"  # the CUDA driver is left alone
    assert nvml not in found["now"]
    assert found["at_import"]["FOR_A_WHILE"] == "1"
    assert "FOR_A_WHILE" not in found["now"]
    assert found["now"]["SINCE_THEN"] == "2"


def test_a_dead_spare_is_not_used(pool: WarmPool, in_warm) -> None:
    pool.prepare(MODULES)
    first = pool.take(MODULES)
    assert first is not None
    first.stop()
    pool.prepare(["no_such_module"])
    assert wait_for(lambda: pool.take(["no_such_module"]) is None)
    pool.prepare(["no_such_module"])
    assert in_warm(pool.take(["no_such_module"]))["pid"] != os.getpid()


@pytest.mark.parametrize("when", ["before it gets the work", "as it gets the work"])
def test_a_spare_that_dies_first_loses_nothing(
    pool: WarmPool, in_warm, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_module.py").write_text(f"import time\ntime.sleep({10 * PATIENCE})\n")
    monkeypatch.syspath_prepend(tmp_path)
    pool.prepare(["slow_module"])  # it does not come to its work
    warm = pool.take(["slow_module"])
    assert warm is not None
    if when == "before it gets the work":
        os.kill(warm.pid, signal.SIGKILL)
        assert wait_for(lambda: gone(warm.pid))
        found = in_warm(warm)
    else:
        submit = warm.submit

        def submit_and_kill(*args: Any, **options: Any) -> None:
            submit(*args, **options)
            os.kill(warm.pid, signal.SIGKILL)

        warm.submit = submit_and_kill  # type: ignore[method-assign]
        found = in_warm(warm)
    assert found["pid"] not in (warm.pid, os.getpid())


def test_work_that_kills_the_spare_is_not_done_again(pool: WarmPool, tmp_path: Path) -> None:
    pool.prepare(MODULES)
    with pytest.raises(OutOfMemoryError, match="killed after"):
        run_in_subprocess(
            functools.partial(works.end, how="kill"),
            log=tmp_path / "worker.log",
            remedy=REMEDY,
            report=no_report,
            warm=pool.take(MODULES),
        )
    assert (tmp_path / "worker.log").read_text().count("the last words") == 1


def test_spares_that_nobody_takes_are_ended(pool: WarmPool, children: Callable[[], set[int]]) -> None:
    pool.prepare(MODULES)
    (waiting,) = children()
    pool.close()
    assert gone(waiting)
    assert pool.take(MODULES) is None


@pytest.mark.parametrize("how", ["end", "kill"])
def test_a_forgotten_spare_ends_with_the_program(tmp_path: Path, how: str) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import multiprocessing, sys, time\n"
        "from pathlib import Path\n"
        "from dice_py.compute.stage_process import WarmPool\n"
        "if __name__ == '__main__':\n"
        "    pool = WarmPool()\n"
        "    pool.prepare(['json'])\n"
        "    (warm,) = multiprocessing.active_children()\n"
        "    Path(sys.argv[1]).write_text(str(warm.pid))\n"
        "    time.sleep(0 if sys.argv[2] == 'end' else 600)\n"
    )
    command = [sys.executable, str(script), str(tmp_path / "pid"), how]
    parent = subprocess.Popen(command, env=child_environment())
    try:
        assert wait_for(lambda: has_text(tmp_path / "pid"))
        warm = int((tmp_path / "pid").read_text())
        if how == "kill":
            assert not gone(warm)
            parent.kill()
        parent.wait(PATIENCE)
        assert wait_for(lambda: gone(warm))
    finally:
        parent.kill()
        parent.wait()


def test_a_process_that_stays_does_the_next_work_with_what_it_holds(
    pool: WarmPool, children: Callable[[], set[int]], tmp_path: Path
) -> None:
    events: list[tuple[str, dict[str, Any]]] = []

    def report(event: str, **fields: Any) -> None:
        events.append((event, fields))

    keep = functools.partial(pool.keep, MODULES)
    first, second = tmp_path / "first.log", tmp_path / "second.log"
    before = run_in_subprocess(group_work.whoami, log=first, remedy=REMEDY, report=report, keep=keep)
    warm = pool.take(MODULES)
    assert warm is not None
    assert warm.is_alive()
    after = run_in_subprocess(group_work.whoami, log=second, remedy=REMEDY, report=report, warm=warm)
    assert after["pid"] == before["pid"]
    assert [event for event, _ in events].count("process") == 2
    assert first.exists()
    assert second.exists()
    assert children() == set()


def test_a_process_that_failed_does_not_stay(pool: WarmPool, children: Callable[[], set[int]], tmp_path: Path) -> None:
    keep = functools.partial(pool.keep, MODULES)
    with pytest.raises(RuntimeError):
        run_in_subprocess(
            functools.partial(works.fail, ValueError("a bug")),
            log=tmp_path / "log",
            remedy=REMEDY,
            report=no_report,
            keep=keep,
        )
    assert pool.take(MODULES) is None
    assert children() == set()


def test_a_process_that_stays_ends_where_nobody_takes_it(
    pool: WarmPool, children: Callable[[], set[int]], tmp_path: Path
) -> None:
    for end in (pool.end_stayed, pool.close):
        keep = functools.partial(pool.keep, MODULES)
        run_in_subprocess(group_work.whoami, log=tmp_path / "log", remedy=REMEDY, report=no_report, keep=keep)
        assert len(children()) == 1
        end()
        assert children() == set()
