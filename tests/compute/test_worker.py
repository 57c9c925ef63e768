"""A stage in a process: values and events come back, every end has its error, and no process is left behind."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import worker_works as works
from places import child_environment
from processes import PATIENCE, gone, has_text, wait_for
from small_disk import small_disk

from dice_py.compute.failures import failure_fields, is_out_of_memory
from dice_py.compute.stage_process import run_in_subprocess
from dice_py.errors import DataError, DiceError, DiskFullError, InterruptedRunError, OutOfMemoryError, UsageError
from dice_py.events import Report

REMEDY = "lower some.budget"


@pytest.fixture
def stage(tmp_path: Path) -> Callable[..., Any]:
    """Runs a function of this file in a worker, its log at `tmp_path/deep/worker.log`."""

    def run(work: Any, report: Report | None = None, **arguments: Any) -> Any:
        listen = report or (lambda event, **fields: None)
        log = tmp_path / "deep" / "worker.log"
        return run_in_subprocess(functools.partial(work, **arguments), log=log, remedy=REMEDY, report=listen)

    return run


# --- values and events -------------------------------------------------------------------------------------


def test_values_events_and_the_log(stage, tmp_path: Path) -> None:
    heard: list[tuple[str, dict[str, Any]]] = []
    value = stage(works.add, lambda event, **fields: heard.append((event, fields)), left=1, right=2)
    assert value["sum"] == 3
    assert value["path"] == Path("x")
    assert value["pid"] != os.getpid()
    assert [event for event, _ in heard] == ["note", "progress", "progress", "process"]
    assert heard[-2][1] == {"stage": "add", "done": 2, "total": 2, "unit": "numbers"}
    log = tmp_path / "deep" / "worker.log"
    assert log.read_text() == "printed by the stage\nwritten by a library\n"
    stage(works.add, left=1, right=2)
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

    stage(works.take_time, on_event, loading=0.1, working=0.2)
    with pytest.raises(UsageError, match="no result"):  # a failure has its times too
        stage(works.take_time, on_event, loading=0.1, working=0.2, error=UsageError("no result"))
    assert [event for event, _ in heard] == ["process"] * 2
    for _, fields in heard:
        assert fields["work"] == "worker_works:take_time"
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
        (works.OfAStageError("bad data"), "OfAStageError", 3, "bad data"),
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


def accelerator_error(text: str) -> BaseException:
    """As torch raises a CUDA error, a RuntimeError of its own kind; its own cannot be made without a device."""
    return type("AcceleratorError", (RuntimeError,), {})(text)


@pytest.mark.parametrize(
    "error",
    [
        accelerator_error("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in the runtime's errors"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
        RuntimeError("NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
        # vLLM 0.32: the sampler's warm-up, a worker of tensor parallelism, and the three checks of its cache.
        RuntimeError("CUDA out of memory occurred when warming up sampler with 256 dummy requests. Please try …"),
        RuntimeError("Worker failed with error 'CUDA out of memory. Tried to allocate 2.00 GiB', please check …"),
        ValueError("No available memory for the cache blocks. Try increasing `gpu_memory_utilization`."),
        ValueError("3.0 GiB KV cache is needed, which is larger than the available KV cache memory (1.2 GiB)."),
        ValueError("Free memory on device cuda:0 (1/79 GiB) on startup is less than desired GPU memory utilization"),
    ],
)
def test_forms_of_a_lack_of_memory(error: BaseException) -> None:
    assert is_out_of_memory(error)
    assert is_out_of_memory(caused(RuntimeError("engine failed"), error))
    assert failure_fields(error)["exit_code"] == 4


@pytest.mark.parametrize(
    "error",
    [
        ValueError("out of range"),
        ValueError("a flag named 'out of memory'"),  # not an error of a device
        accelerator_error("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
        RuntimeError("CUDA error: device-side assert triggered"),
        None,
    ],
)
def test_what_is_no_lack_of_memory(error: BaseException | None) -> None:
    assert not is_out_of_memory(error)


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (DataError("prompts.jsonl, line 3: bad"), DataError, "prompts.jsonl, line 3: bad"),
        (works.OfAStageError("bad data"), DiceError, "bad data"),
        (MemoryError(), OutOfMemoryError, f"out of memory: MemoryError; {REMEDY}. The log is"),
        (NO_ROOM, DiskFullError, "no room left on the disk"),
        (KeyboardInterrupt(), InterruptedRunError, "interrupted"),
    ],
)
def test_errors_cross_to_the_parent(stage, error: BaseException, kind: type[DiceError], said: str) -> None:
    with pytest.raises(kind) as caught:
        stage(works.fail, error=error)
    assert said in str(caught.value)
    assert caught.value.exit_code == failure_fields(error)["exit_code"]


def test_a_bug_comes_with_the_workers_traceback(stage, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        stage(works.fail, error=ValueError("what went wrong"))
    assert "ValueError: what went wrong" in str(caught.value)
    assert "in fail" in str(caught.value)
    assert str(tmp_path / "deep" / "worker.log") in str(caught.value)
    assert "ValueError: what went wrong" in (tmp_path / "deep" / "worker.log").read_text()
    with pytest.raises(RuntimeError, match=r"pickle|local object"):
        stage(works.unpicklable)


def test_a_worker_that_ends_by_itself(stage) -> None:
    with pytest.raises(RuntimeError, match=r"ended without a result \(exit code 3\)(.|\n)*the last words"):
        stage(works.end, how="exit")


def test_a_worker_that_crashes_leaves_its_stack_in_the_log(stage, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=rf"exit code -{signal.SIGSEGV.value}\)(.|\n)*in string_at(.|\n)*in end"):
        stage(works.end, how="segfault")
    assert "Segmentation fault" in (tmp_path / "deep" / "worker.log").read_text()


def test_a_worker_killed_by_the_kernel_ran_out_of_memory(stage) -> None:
    with pytest.raises(OutOfMemoryError, match=f"killed after .* memory runs out.*{REMEDY}.*worker.log") as caught:
        stage(works.end, how="kill")
    assert caught.value.exit_code == 4


def test_a_worker_that_was_stopped_was_interrupted(stage) -> None:
    with pytest.raises(InterruptedRunError, match="was terminated") as caught:
        stage(works.end, how="terminate")
    assert caught.value.exit_code == 5


def test_a_log_that_cannot_be_opened_is_a_sentence(stage, tmp_path: Path) -> None:
    (tmp_path / "deep" / "worker.log").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"worker\.log: Is a directory"):
        stage(works.add, left=1, right=2)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_under_the_log_hides_no_result(stage, tmp_path: Path) -> None:
    with small_disk(tmp_path / "deep", "8k") as disk:
        (disk / "worker.log").touch()
        with contextlib.suppress(OSError):
            (disk / "full").write_bytes(b"x" * 2**14)
        with pytest.raises(DiskFullError):  # from `print`
            stage(works.add, left=1, right=2)
        with pytest.raises(RuntimeError, match="ValueError: a bug"):
            stage(works.fail, error=ValueError("a bug"))


# --- nobody is left behind ---------------------------------------------------------------------------------


def test_a_worker_ends_with_its_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from dice_py.events import no_report\n"
        "import functools, worker_works\n"
        "from dice_py.compute.stage_process import run_in_subprocess\n"
        "folder = Path(sys.argv[1])\n"
        "if __name__ == '__main__':\n"
        "    work = functools.partial(worker_works.wait_long, pid_file=str(folder / 'pid'))\n"
        "    log = folder / 'worker.log'\n"
        "    run_in_subprocess(work, log=log, remedy='', report=no_report)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=child_environment())
    try:
        assert wait_for(lambda: has_text(tmp_path / "pid"))
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
        stage(works.wait_long, interrupt, pid_file=str(tmp_path / "pid"))
    assert gone(int((tmp_path / "pid").read_text()))


def test_a_process_that_the_worker_left_holds_nobody_up(stage, tmp_path: Path) -> None:
    began = time.monotonic()
    try:
        with pytest.raises(RuntimeError, match=r"exit code 3"):
            stage(works.leave_a_child, pid_file=str(tmp_path / "pid"))
        assert time.monotonic() - began < PATIENCE
    finally:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
