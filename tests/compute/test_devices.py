"""Which groups of devices a stage has, from the config and the GPUs that torch sees. No GPU is needed."""

from __future__ import annotations

import importlib.machinery
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch as real_torch

from dice_py.compute.devices import Group, device_in_group, find_groups
from dice_py.config.shared import DevicesConfig, ModelConfig
from dice_py.errors import UsageError

Events = list[tuple[str, dict[str, Any]]]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A torch that sees so many GPUs, and has nothing that would start CUDA."""

    def pretend(count: int, visible: str | None = None) -> None:
        def ask() -> int:
            assert os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"  # or the CUDA driver would be started
            return count

        torch = types.ModuleType("torch")
        torch.__spec__ = importlib.machinery.ModuleSpec("torch", None)
        torch.device = real_torch.device  # type: ignore[attr-defined]
        torch.cuda = types.SimpleNamespace(is_available=lambda: ask() > 0, device_count=ask)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "torch", torch)
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    monkeypatch.delenv("PYTORCH_NVML_BASED_CUDA_CHECK", raising=False)
    yield pretend
    assert "PYTORCH_NVML_BASED_CUDA_CHECK" not in os.environ


def found(
    device: str = "auto", size: int = 1, report: Any = None, **devices: Any
) -> list[tuple[int, tuple[str, ...], bool]]:
    groups = find_groups(DevicesConfig(**devices), ModelConfig(device=device), size=size, report=report)
    assert all(group.threads is None for group in groups)
    return [(group.number, group.gpus, group.needs_process) for group in groups]


def test_one_gpu_is_one_group_here(gpus: Callable[..., None]) -> None:
    gpus(1)
    assert found() == found("cuda") == found("cuda:0") == [(1, ("0",), False)]


def test_a_group_for_each_gpu(gpus: Callable[..., None]) -> None:
    gpus(3)
    assert [group[:2] for group in found()] == [(1, ("0",)), (2, ("1",)), (3, ("2",))]
    assert found(gpus=[0]) == [(1, ("0",), False)]
    assert found(gpus=[2]) == found("cuda:2") == [(1, ("2",), True)]
    assert [group[1] for group in found(gpus=[2, 0])] == [("2",), ("0",)]


def test_numbers_are_among_the_visible_gpus(gpus: Callable[..., None]) -> None:
    gpus(3, "GPU-a, GPU-b,GPU-c")
    assert found(gpus=[1]) == [(1, ("GPU-b",), True)]
    assert found("cuda:0") == [(1, ("GPU-a",), False)]
    gpus(2, "5,3,-1,0")  # CUDA stops reading at the -1
    assert [group[1] for group in found()] == [("5",), ("3",)]


def test_groups_of_several_gpus(gpus: Callable[..., None]) -> None:
    gpus(5)
    events: Events = []
    groups = found(size=2, report=lambda event, **fields: events.append((event, fields)))
    assert [group[1] for group in groups] == [("0", "1"), ("2", "3")]
    assert events == [("note", {"text": "GPU(s) 4 stay idle: a group takes 2"})]
    assert found(size=2, gpus=[0, 1]) == [(1, ("0", "1"), False)]
    assert found(size=2, gpus=[1, 0]) == [(1, ("1", "0"), True)]
    assert str(Group(2, ("2", "3"))) == "group 2 (GPUs 2, 3)"


@pytest.mark.parametrize(
    ("device", "options", "said"),
    [
        ("auto", {"gpus": [0, 4]}, r"devices\.gpus names GPU 4, but 3 GPU\(s\) are visible"),
        ("auto", {"gpus": [1, 1]}, r"devices\.gpus names GPU 1 twice"),
        ("auto", {"gpus": []}, r"devices\.gpus is an empty list"),
        ("cuda:3", {}, r"model\.device is 'cuda:3', but torch sees 3 GPUs"),
        ("cuda:x", {}, r"model\.device is 'cuda:x'"),
        ("cuda:1", {"gpus": [0, 2]}, r"model\.device is 'cuda:1', but devices\.gpus is \[0, 2\]"),
        ("auto", {"size": 4}, r"tensor_parallel_size is 4, but the stage has 3 GPU\(s\)"),
        ("cuda:1", {"size": 2}, r"tensor_parallel_size is 2, but the stage has 1 GPU\(s\)"),
        ("cpu", {"size": 2}, r"tensor_parallel_size is 2, but model\.device is cpu"),
        ("cpu", {"gpus": [0]}, r"devices\.gpus is \[0\], but the model is to be on cpu"),
    ],
)
def test_gpus_that_are_not_there(gpus: Callable[..., None], device: str, options: dict[str, Any], said: str) -> None:
    gpus(3)
    with pytest.raises(UsageError, match=said):
        found(device, **options)


def test_processes_on_the_cpu_share_the_cores(gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(7)))
    config = ModelConfig()
    assert find_groups(DevicesConfig(), config) == [Group(1, threads=7)]
    assert find_groups(DevicesConfig(cpu_processes=3), config) == [Group(n, threads=2) for n in (1, 2, 3)]
    assert [group.threads for group in find_groups(DevicesConfig(cpu_processes=9), config)] == [1] * 9
    gpus(2)
    assert find_groups(DevicesConfig(), ModelConfig(device="cpu")) == [Group(1, threads=7)]


def test_in_its_process_a_groups_gpu_is_the_first() -> None:
    assert device_in_group(ModelConfig(device="cuda:3")).device == "cuda:0"
    for device in ("auto", "cuda", "cpu"):
        assert device_in_group(ModelConfig(device=device)).device == device
