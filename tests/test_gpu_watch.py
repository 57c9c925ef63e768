"""The watch of the GPUs, with shell scripts in nvidia-smi's place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dice_py.compute.gpu_monitor import GpuMonitor, usable_gpus
from dice_py.config.shared import DevicesConfig, ModelConfig

MIB = 2**20
TWO_GPUS = """
echo "$$" > "$PIDS"
while :; do
    echo "0, 0, 1000, 80000"
    echo "1, 60, 3000, 80000"
    sleep 0.02
done
"""
"""GPU 0 idles and GPU 1 works."""


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], Path]:
    """Puts a script in nvidia-smi's place, or nothing; returns the file in which it may leave its process id."""

    def put(script: str | None) -> Path:
        folder, pids = tmp_path / "bin", tmp_path / "pids"
        folder.mkdir()
        if script is not None:
            (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}")
            (folder / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        monkeypatch.setenv("PIDS", str(pids))
        return pids

    return put


def until(true: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_there(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_figures_of_each_gpu(nvidia_smi) -> None:
    pids = nvidia_smi(
        'echo "$@" > "$PIDS"\n'
        'echo "0, 0, 1000, 80000"; echo "1, 50, 10, 80000"; echo "0, 100, 3000, 80000"; echo "0, 0, 2000, 80000"\n'
        'echo "0, 60, 500, 80000"; echo "1, 100, 10, 80000"'
    )
    with GpuMonitor() as watch:
        until(lambda: watch.problem)  # it has ended, and all that it said is read
        found = watch.take()
        assert watch.take() == []  # only what came since
    assert pids.read_text().split() == [
        "--query-gpu=index,utilization.gpu,memory.used,memory.total", "--format=csv,noheader,nounits", "-lms", "1000",
    ]  # fmt: skip
    assert found == [
        {
            "index": 0,
            "samples": 4,
            "idle_samples": 2,
            "idle_share": 0.5,
            "mean_utilisation": 0.4,
            "peak_memory_bytes": 3000 * MIB,
            "memory_bytes": 80000 * MIB,
        },
        {
            "index": 1,
            "samples": 2,
            "idle_samples": 0,
            "idle_share": 0.0,
            "mean_utilisation": 0.75,
            "peak_memory_bytes": 10 * MIB,
            "memory_bytes": 80000 * MIB,
        },
    ]


def test_it_ends_with_the_watch(nvidia_smi) -> None:
    pids = nvidia_smi(TWO_GPUS)

    def fail_while_watching() -> None:
        with GpuMonitor({1}) as watch:
            found: list[dict] = []
            until(lambda: found.extend(watch.take()) or found)
            assert {gpu["index"] for gpu in found} == {1}  # the other is not this run's
            assert is_there(int(pids.read_text()))
            raise KeyError

    with pytest.raises(KeyError):
        fail_while_watching()
    assert not is_there(int(pids.read_text()))


def test_one_that_does_not_heed_is_killed(nvidia_smi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dice_py.compute.gpu_monitor._END_SECONDS", 0.2)
    pids = nvidia_smi(f"trap '' TERM\n{TWO_GPUS}")
    with GpuMonitor() as watch:
        until(watch.take)
        process = int(pids.read_text())
    assert not is_there(process)


def test_it_does_not_outlive_a_killed_run(nvidia_smi, tmp_path: Path) -> None:
    pids = nvidia_smi(TWO_GPUS)
    script = (
        "import time\nfrom dice_py.compute.gpu_monitor import GpuMonitor\n"
        "with GpuMonitor() as watch:\n"
        "    while not watch.take():\n        time.sleep(0.01)\n"
        "    print('watching', flush=True)\n    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", script]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, start_new_session=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"watching\n"
        process = int(pids.read_text())
        assert is_there(process)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
    until(lambda: not is_there(process))


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        (None, "no GPU seen: nvidia-smi is not installed"),
        ("exit 6", "no GPU seen: nvidia-smi ended with exit code 6"),
        (
            "echo 'Failed to initialize NVML: Driver/library version mismatch'; echo; exit 18",
            "no GPU seen: nvidia-smi ended with exit code 18; nvidia-smi says: "
            "Failed to initialize NVML: Driver/library version mismatch",
        ),
        (
            "printf '\\n\\377\\376 1, 2\\n, , ,\\nx, 1, 2, 3\\n'; exec sleep 60",
            "no GPU seen: nvidia-smi says: \ufffd\ufffd 1, 2",
        ),
        ("echo '0, 5, 6, 7'; echo 'GPU is lost'; exit 15", "GPU figures end: nvidia-smi ended with exit code 15"),
    ],
)
def test_without_figures_it_says_why(nvidia_smi, script: str | None, problem: str) -> None:
    nvidia_smi(script)
    with GpuMonitor() as watch:
        until(lambda: watch.problem == problem)
        assert [gpu["samples"] for gpu in watch.take()] == ([1] if "end:" in problem else [])


def test_a_script_that_cannot_be_started(nvidia_smi, tmp_path: Path) -> None:
    nvidia_smi("")
    (tmp_path / "bin/nvidia-smi").write_bytes(b"\x7fELF nothing that runs")
    with GpuMonitor() as watch:
        assert watch.problem == "no GPU seen: nvidia-smi cannot be started (Exec format error)"


def test_a_gpu_that_does_not_tell(nvidia_smi) -> None:
    nvidia_smi("echo '0, [N/A], 1000, 80000'; echo '1, 5, [N/A], [N/A]'; exec sleep 60")
    with GpuMonitor() as watch:
        found: list[dict] = []
        until(lambda: found.extend(watch.take()) or len(found) == 2)
    assert [(gpu["idle_share"], gpu["mean_utilisation"], gpu["peak_memory_bytes"]) for gpu in found] == [
        (None, None, 1000 * MIB),
        (0.0, 0.05, None),
    ]


def test_a_run_that_may_use_none(nvidia_smi) -> None:
    pids = nvidia_smi(TWO_GPUS)
    with GpuMonitor(set()) as watch:
        assert watch.problem is not None
        assert watch.problem.startswith("no GPU seen: the run may use none")
    assert not pids.exists()


@pytest.mark.parametrize(
    ("visible", "gpus", "device", "used"),
    [
        (None, "all", "auto", None),
        (None, [0, 2], "auto", {0, 2}),
        (None, "all", "cuda:3", {3}),
        (None, "all", "cpu", set()),
        ("4, 6,7", "all", "cuda", {4, 6, 7}),
        ("4,6,7", [0, 2], "auto", {4, 7}),
        ("4,6,7", "all", "cuda:1", {6}),
        ("4,6", [5], "auto", set()),
        ("2,-1,3", "all", "auto", {2}),
        ("", "all", "auto", set()),
        ("GPU-5ebe9f43,1", "all", "auto", None),
    ],
)
def test_which_gpus_a_run_may_use(
    visible: str | None, gpus, device: str, used: set[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert usable_gpus(DevicesConfig(gpus=gpus), ModelConfig(device=device)) == used
