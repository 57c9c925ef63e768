"""The monitor of the GPUs, with a fake NVML."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
from processes import wait_for

from dice_py.compute import gpu_monitor
from dice_py.compute.gpu_monitor import GpuMonitor, gpu_names, usable_gpus
from dice_py.config.shared import DevicesConfig, ModelConfig

MIB = 2**20
Sample = tuple[int | None, int]
"""Utilization in percent (None: not supported), and MiB in use."""


class FakeNvml(SimpleNamespace):
    """NVML with the given samples of each GPU, one after the other; the last is repeated, or an error is raised."""

    NVMLError = pynvml.NVMLError
    NVMLError_LibraryNotFound = pynvml.NVMLError_LibraryNotFound
    NVMLError_NotSupported = pynvml.NVMLError_NotSupported

    def __init__(self, *gpus: list[Sample | Exception], init: Exception | None = None) -> None:
        super().__init__()
        self.gpus, self.init, self.open = [list(samples) for samples in gpus], init, 0
        self.now: dict[int, Sample] = {}

    def nvmlInit(self) -> None:  # noqa: N802
        if self.init is not None:
            raise self.init
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetName(self, index: int) -> str:  # noqa: N802
        return f"GPU model {index}"

    def nvmlDeviceGetUtilizationRates(self, index: int) -> Any:  # noqa: N802
        samples = self.gpus[index]
        sample = samples.pop(0) if len(samples) > 1 else samples[0]
        if isinstance(sample, Exception):
            raise sample
        self.now[index] = sample
        if sample[0] is None:
            raise pynvml.NVMLError_NotSupported()
        return SimpleNamespace(gpu=sample[0])

    def nvmlDeviceGetMemoryInfo(self, index: int) -> Any:  # noqa: N802
        return SimpleNamespace(used=self.now.get(index, (0, 0))[1] * MIB, total=80000 * MIB)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeNvml]:
    """Puts a fake in the place of NVML, and samples without pause."""

    def put(*gpus: list[Sample | Exception], init: Exception | None = None) -> FakeNvml:
        fake = FakeNvml(*gpus, init=init)
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        monkeypatch.setattr(gpu_monitor, "INTERVAL_SECONDS", 0.001)
        return fake

    return put


LOST = pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)


def test_figures_of_each_gpu(nvml) -> None:
    fake = nvml([(0, 1000), (100, 3000), (0, 2000), (60, 500), LOST], [(50, 10), (100, 10), (50, 10), (100, 10)])
    with GpuMonitor() as monitor:
        assert wait_for(lambda: monitor.problem)
        figures = monitor.take()
        assert monitor.take() == []  # only what came since
    assert figures == [
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
            "samples": 4,
            "idle_samples": 0,
            "idle_share": 0.0,
            "mean_utilisation": 0.75,
            "peak_memory_bytes": 10 * MIB,
            "memory_bytes": 80000 * MIB,
        },
    ]
    assert fake.open == 0  # NVML is shut down


def test_only_the_runs_gpus_are_sampled_until_it_ends(nvml) -> None:
    fake = nvml([(0, 1)], [(60, 3000)])

    def fail_meanwhile() -> None:
        with GpuMonitor({1}) as monitor:
            figures: list[dict] = []
            assert wait_for(lambda: figures.extend(monitor.take()) or figures)
            assert {gpu["index"] for gpu in figures} == {1}
            assert fake.open == 1
            raise KeyError

    with pytest.raises(KeyError):
        fail_meanwhile()
    assert fake.open == 0


@pytest.mark.parametrize(
    ("gpus", "init", "problem"),
    [
        ([], pynvml.NVMLError_LibraryNotFound(), "no GPU seen: there is no NVIDIA driver"),
        ([], pynvml.NVMLError_LibRmVersionMismatch(), "no GPU seen: NVML: "),
        ([], None, "no GPU seen: NVML has 0 GPU(s), and none of those that the run may use"),
        ([[LOST]], None, "no GPU seen: NVML: "),
        ([[(5, 6), LOST]], None, "GPU figures end: NVML: "),
    ],
)
def test_without_figures_there_is_a_reason(nvml, gpus: Any, init: Exception | None, problem: str) -> None:
    fake = nvml(*gpus, init=init)
    with GpuMonitor() as monitor:
        assert wait_for(lambda: monitor.problem)
        assert monitor.problem is not None
        assert monitor.problem.startswith(problem)
        assert [gpu["samples"] for gpu in monitor.take()] == ([1] if "end:" in problem else [])
    assert fake.open == 0


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # the import fails
    with GpuMonitor() as monitor:
        wait_for(lambda: monitor.problem is not None)
    problem = "no GPU seen: pynvml is not installed; add it with: pip install 'dice-align[train]'"
    assert monitor.problem == problem
    assert monitor.take() == []


def test_on_this_machine() -> None:
    """The real NVML: figures where there is a GPU, else the reason."""
    with GpuMonitor() as monitor:
        assert wait_for(lambda: monitor.problem or monitor.take())
    assert gpu_names(None) == [] or all("MiB" in name for name in gpu_names(None))


def test_a_gpu_that_does_not_report_its_utilization(nvml) -> None:
    nvml([(None, 1000)])
    with GpuMonitor() as monitor:
        figures: list[dict] = []
        assert wait_for(lambda: figures.extend(monitor.take()) or figures)
    gpu = figures[0]
    assert (gpu["idle_share"], gpu["mean_utilisation"], gpu["peak_memory_bytes"]) == (None, None, 1000 * MIB)


def test_a_run_that_may_use_none(nvml) -> None:
    fake = nvml([(0, 1)])
    with GpuMonitor(set()) as monitor:
        assert monitor.problem is not None
        assert monitor.problem.startswith("no GPU seen: the run may use none")
    assert fake.now == {}
    assert gpu_names(set()) == []


def test_names(nvml) -> None:
    nvml([(0, 1)], [(0, 1)])
    assert gpu_names(None) == ["GPU model 0, 80000 MiB", "GPU model 1, 80000 MiB"]
    assert gpu_names({1}) == ["GPU model 1, 80000 MiB"]
    nvml(init=pynvml.NVMLError_LibraryNotFound())
    assert gpu_names(None) == []


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


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("torch") is None or not gpu_names(None), reason="needs a GPU")
def test_figures_of_a_real_gpu() -> None:
    import torch

    held = torch.ones(2**26, device="cuda")
    samples: list[dict[str, Any]] = []
    with GpuMonitor() as monitor:
        assert wait_for(lambda: bool(samples.extend(monitor.take()) or samples) or monitor.problem is not None)
    assert monitor.problem is None
    assert max(sample["peak_memory_bytes"] for sample in samples) >= held.nbytes
    assert all(sample["memory_bytes"] >= sample["peak_memory_bytes"] for sample in samples)
