"""The process of its own: values and events come back, every end has its error, and nobody is left behind."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dice_py.compute.failures import failure_fields, is_out_of_memory
from dice_py.compute.stage_process import WarmPool, run_in_subprocess
from dice_py.compute.worker import Worker
from dice_py.errors import DataError, DiceError, DiskFullError, InterruptedRunError, OutOfMemoryError, UsageError
from dice_py.events import Report, no_report
from dice_py.timing import timed

REMEDY = "lower some.budget"
PATIENCE = 20.0  # seconds; what is waited for takes a fraction of one


class OfAStageError(DataError):
    """A kind of error that the parent does not know."""


def gone(pid: int) -> bool:
    """True once the process has ended (a zombie that nobody has asked after counts)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def wait_for(what: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if what():
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def stage(tmp_path: Path) -> Callable[..., Any]:
    """Runs a function of this file in a worker, its log at `tmp_path/deep/worker.log`."""

    def run(work: Any, report: Report | None = None, **arguments: Any) -> Any:
        listen = report or (lambda event, **fields: None)
        log = tmp_path / "deep" / "worker.log"
        return run_in_subprocess(functools.partial(work, **arguments), log=log, remedy=REMEDY, report=listen)

    return run


# --- what runs in the worker -------------------------------------------------------------------------------


def add(left: int, right: int, *, report: Report) -> dict[str, Any]:
    print("printed by the stage")
    os.write(2, b"written by a library\n")
    report("note", text="adding")
    for done in (1, 2):
        report("progress", stage="add", done=done, total=2, unit="numbers")
    return {"sum": left + right, "pid": os.getpid(), "path": Path("x")}


def fail(error: BaseException, *, report: Report) -> None:
    raise error


def end(how: str, *, report: Report) -> None:
    print("the last words", flush=True)
    if how == "exit":
        os._exit(3)
    if how == "segfault":
        ctypes.string_at(0)
    os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGTERM)
    time.sleep(PATIENCE)


def leave_a_child(pid_file: str, *, report: Report) -> None:
    """Ends without a result, while a process that it forked lives on and holds all its pipes."""
    child = os.fork()
    if child == 0:
        time.sleep(10 * PATIENCE)
        os._exit(0)
    Path(pid_file).write_text(str(child))
    os._exit(3)


def wait_long(pid_file: str, *, report: Report) -> None:
    Path(pid_file).write_text(str(os.getpid()))
    report("note", text="waiting")
    time.sleep(10 * PATIENCE)


def take_time(loading: float, working: float, error: BaseException | None = None, *, report: Report) -> None:
    with timed("load"):
        time.sleep(loading)
    time.sleep(working)
    if error is not None:
        raise error


def unpicklable(*, report: Report) -> Any:
    return lambda: None


# --- values and events -------------------------------------------------------------------------------------


def test_values_events_and_the_log(stage, tmp_path: Path) -> None:
    heard: list[tuple[str, dict[str, Any]]] = []
    value = stage(add, lambda event, **fields: heard.append((event, fields)), left=1, right=2)
    assert value["sum"] == 3
    assert value["path"] == Path("x")
    assert value["pid"] != os.getpid()
    assert [event for event, _ in heard] == ["note", "progress", "progress", "process"]
    assert heard[-2][1] == {"stage": "add", "done": 2, "total": 2, "unit": "numbers"}
    log = tmp_path / "deep" / "worker.log"
    assert log.read_text() == "printed by the stage\nwritten by a library\n"
    stage(add, left=1, right=2)
    assert log.read_text().count("printed") == 2  # a resume goes on in the same log


def test_what_every_process_imports_is_light() -> None:
    heavy = ("polars", "pyarrow", "pydantic", "torch", "transformers")
    modules = "dice_py.compute.stage_process, dice_py.compute.dispatch"
    code = f"import sys, {modules}; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_worker_tells_where_its_time_went(stage) -> None:
    heard: list[tuple[str, dict[str, Any]]] = []

    def on_event(event: str, **fields: Any) -> None:
        heard.append((event, fields))

    stage(take_time, on_event, loading=0.1, working=0.2)
    with pytest.raises(UsageError, match="no result"):  # a failure has its times too
        stage(take_time, on_event, loading=0.1, working=0.2, error=UsageError("no result"))
    assert [event for event, _ in heard] == ["process"] * 2
    for _, fields in heard:
        assert fields["work"] == f"{__name__}:take_time"
        seconds = fields["seconds"]
        assert set(seconds) == {"spawn", "import", "load", "work", "total"}
        assert all(value >= 0 for value in seconds.values())
        assert seconds["spawn"] > 0
        assert seconds["import"] > 0
        assert seconds["load"] >= 0.1
        assert seconds["work"] >= 0.2
        parts = sum(value for name, value in seconds.items() if name != "total")
        assert seconds["total"] == pytest.approx(parts, abs=0.005)  # each is rounded


# --- errors ------------------------------------------------------------------------------------------------


def out_of_memory_as_torch_raises_it() -> BaseException:
    kind = type("OutOfMemoryError", (RuntimeError,), {})
    return kind("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


NO_ROOM = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/some/file")


@pytest.mark.parametrize(
    ("error", "kind", "code", "said"),
    [
        (UsageError("a wrong option"), "UsageError", 2, "a wrong option"),
        (OfAStageError("bad data"), "OfAStageError", 3, "bad data"),
        (OutOfMemoryError("too big"), "OutOfMemoryError", 4, "too big"),
        (DiskFullError("full"), "DiskFullError", 5, "full"),
        (KeyboardInterrupt(), "InterruptedRunError", 5, "interrupted"),
        (MemoryError(), "OutOfMemoryError", 4, "MemoryError"),
        (
            out_of_memory_as_torch_raises_it(),
            "OutOfMemoryError",
            4,
            "CUDA out of memory. Tried to allocate 2.00 GiB.",
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
            "OutOfMemoryError",
            4,
            "DefaultCPUAllocator",
        ),
        (caused(RuntimeError("engine failed"), MemoryError()), "OutOfMemoryError", 4, "engine failed"),
        (NO_ROOM, "DiskFullError", 5, "/some/file"),
        (caused(RuntimeError("save failed"), NO_ROOM), "DiskFullError", 5, "save failed"),
        (PermissionError(errno.EACCES, "Permission denied", "/some/file"), "UsageError", 2, "/some/file"),
        (ValueError("a bug"), "bug", 1, "ValueError: a bug"),
        (SystemExit(7), "bug", 1, "SystemExit: 7"),
    ],
)
def test_every_error_has_its_kind_and_exit_code(error: BaseException, kind: str, code: int, said: str) -> None:
    found = failure_fields(error)
    assert (found["kind"], found["exit_code"]) == (kind, code)
    assert said in found["text"]
    if kind == "OutOfMemoryError":
        assert "\n" not in found["text"]


def test_what_is_no_lack_of_memory() -> None:
    assert not is_out_of_memory(ValueError("out of range"))
    assert not is_out_of_memory(None)


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (DataError("prompts.jsonl, line 3: bad"), DataError, "prompts.jsonl, line 3: bad"),
        (OfAStageError("bad data"), DiceError, "bad data"),
        (MemoryError(), OutOfMemoryError, f"out of memory: MemoryError; {REMEDY}. The log is"),
        (NO_ROOM, DiskFullError, "no room left on the disk"),
        (KeyboardInterrupt(), InterruptedRunError, "interrupted"),
    ],
)
def test_errors_cross_to_the_parent(stage, error: BaseException, kind: type[DiceError], said: str) -> None:
    with pytest.raises(kind) as caught:
        stage(fail, error=error)
    assert said in str(caught.value)
    assert caught.value.exit_code == failure_fields(error)["exit_code"]


def test_a_bug_comes_with_the_workers_traceback(stage, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        stage(fail, error=ValueError("what went wrong"))
    assert "ValueError: what went wrong" in str(caught.value)
    assert "in fail" in str(caught.value)
    assert str(tmp_path / "deep" / "worker.log") in str(caught.value)
    assert "ValueError: what went wrong" in (tmp_path / "deep" / "worker.log").read_text()
    with pytest.raises(RuntimeError, match=r"pickle|local object"):
        stage(unpicklable)


def test_a_worker_that_ends_by_itself(stage) -> None:
    with pytest.raises(RuntimeError, match=r"ended without a result \(exit code 3\)(.|\n)*the last words"):
        stage(end, how="exit")


def test_a_worker_that_crashes_leaves_its_stack_in_the_log(stage, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=rf"exit code -{signal.SIGSEGV.value}\)(.|\n)*in string_at(.|\n)*in end"):
        stage(end, how="segfault")
    assert "Segmentation fault" in (tmp_path / "deep" / "worker.log").read_text()


def test_a_worker_killed_by_the_kernel_ran_out_of_memory(stage) -> None:
    with pytest.raises(OutOfMemoryError, match=f"killed after .* memory runs out.*{REMEDY}.*worker.log") as caught:
        stage(end, how="kill")
    assert caught.value.exit_code == 4


def test_a_worker_told_to_stop_was_interrupted(stage) -> None:
    with pytest.raises(InterruptedRunError, match="was terminated") as caught:
        stage(end, how="terminate")
    assert caught.value.exit_code == 5


def test_a_log_that_cannot_be_opened_is_a_sentence(stage, tmp_path: Path) -> None:
    (tmp_path / "deep" / "worker.log").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"worker\.log: Is a directory"):
        stage(add, left=1, right=2)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_under_the_log_hides_no_result(stage, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "worker.log").symlink_to("/dev/full")
    with pytest.raises(DiskFullError):  # from `print`
        stage(add, left=1, right=2)
    with pytest.raises(RuntimeError, match="ValueError: a bug"):
        stage(fail, error=ValueError("a bug"))


# --- nobody is left behind ---------------------------------------------------------------------------------


def test_a_worker_ends_with_its_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from dice_py.events import no_report\n"
        "import functools, test_worker\n"
        "from dice_py.compute.stage_process import run_in_subprocess\n"
        "folder = Path(sys.argv[1])\n"
        "if __name__ == '__main__':\n"
        "    work = functools.partial(test_worker.wait_long, pid_file=str(folder / 'pid'))\n"
        "    log = folder / 'worker.log'\n"
        "    run_in_subprocess(work, log=log, remedy='', report=no_report)\n"
    )
    here = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=here)
    try:
        assert wait_for(lambda: (tmp_path / "pid").is_file() and bool((tmp_path / "pid").read_text()))
        worker = int((tmp_path / "pid").read_text())
        assert not gone(worker)
    finally:
        parent.kill()
        parent.wait()
    assert wait_for(lambda: gone(worker))


def test_an_interrupted_parent_ends_its_worker(stage, tmp_path: Path) -> None:
    def interrupt(event: str, **fields: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage(wait_long, interrupt, pid_file=str(tmp_path / "pid"))
    assert gone(int((tmp_path / "pid").read_text()))


def test_a_process_that_the_worker_left_holds_nobody_up(stage, tmp_path: Path) -> None:
    began = time.monotonic()
    try:
        with pytest.raises(RuntimeError, match=r"exit code 3"):
            stage(leave_a_child, pid_file=str(tmp_path / "pid"))
        assert time.monotonic() - began < PATIENCE
    finally:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


# --- processes started ahead -------------------------------------------------------------------------------


@pytest.fixture
def pool() -> Iterator[WarmPool]:
    with WarmPool() as there:
        yield there


@pytest.fixture
def in_warm(tmp_path: Path) -> Callable[..., Any]:
    """Runs `group_work.whoami` in the warm process, or in a new one: its answer."""

    def run(warm: Worker | None, report: Report = no_report) -> Any:
        import group_work  # prints, so that a process that has imported it shows

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


def test_a_dead_spare_is_not_handed_out(pool: WarmPool, in_warm) -> None:
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
            functools.partial(end, how="kill"),
            log=tmp_path / "worker.log",
            remedy=REMEDY,
            report=no_report,
            warm=pool.take(MODULES),
        )
    assert (tmp_path / "worker.log").read_text().count("the last words") == 1


def test_spares_that_nobody_takes_are_ended(pool: WarmPool) -> None:
    pool.prepare(MODULES)
    (waiting,) = pool._workers.values()
    pool.close()
    assert gone(waiting.pid)
    assert pool.take(MODULES) is None


@pytest.mark.parametrize("how", ["end", "kill"])
def test_a_forgotten_spare_ends_with_the_program(tmp_path: Path, how: str) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from dice_py.compute.stage_process import WarmPool\n"
        "if __name__ == '__main__':\n"
        "    pool = WarmPool()\n"
        "    pool.prepare(['json'])\n"
        "    Path(sys.argv[1]).write_text(str(pool._workers['json',].pid))\n"
        "    time.sleep(0 if sys.argv[2] == 'end' else 600)\n"
    )
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path / "pid"), how], env=here)
    try:
        assert wait_for(lambda: (tmp_path / "pid").is_file() and bool((tmp_path / "pid").read_text()))
        warm = int((tmp_path / "pid").read_text())
        if how == "kill":
            assert not gone(warm)
            parent.kill()
        parent.wait(PATIENCE)
        assert wait_for(lambda: gone(warm))
    finally:
        parent.kill()
        parent.wait()
