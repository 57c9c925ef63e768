"""Groups of devices: which GPUs or cores a process works on."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dice_py.errors import UsageError

if TYPE_CHECKING:
    from dice_py.config.shared import DevicesConfig, ModelConfig
    from dice_py.events import Report

VISIBLE = "CUDA_VISIBLE_DEVICES"
_NVML_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"


@dataclass(frozen=True)
class Group:
    """Devices that work as one: GPUs as CUDA_VISIBLE_DEVICES names them, or a share of the cores."""

    number: int  # from 1
    gpus: tuple[str, ...] = ()
    threads: int | None = None  # of torch, where no GPU is used
    needs_process: bool = False
    """Needs its own process even when it is the only group: its GPUs are not the first of the visible ones."""
    node: str | None = None
    """The address of its node, on a cluster."""

    def __str__(self) -> str:
        gpus = f"GPU{'s' if len(self.gpus) > 1 else ''} {', '.join(self.gpus)}" if self.gpus else ""
        where = ", ".join(filter(None, (gpus, self.node)))
        return f"group {self.number}{where and f' ({where})'}"

    @property
    def environment(self) -> dict[str, str | None]:
        """Environment variables that its process needs before torch is imported."""
        variables: dict[str, str | None] = {}
        if self.gpus:
            variables[VISIBLE] = ",".join(self.gpus)
        if self.threads is not None:
            variables |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self.threads))
        return variables


@contextlib.contextmanager
def cuda_unstarted() -> Iterator[None]:
    """Makes torch count GPUs through NVML, which does not start the CUDA driver.

    Once started, the driver ignores changes of CUDA_VISIBLE_DEVICES; torch.cuda.is_available() alone starts it.
    """
    before = os.environ.get(_NVML_CHECK)
    os.environ[_NVML_CHECK] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NVML_CHECK]
        else:
            os.environ[_NVML_CHECK] = before


def device_in_group(models: ModelConfig) -> ModelConfig:
    """`models` for the work of a group, which sees its own GPUs only: an explicit `cuda:N` is its first there."""
    return models.model_copy(update={"device": "cuda:0"}) if models.device.startswith("cuda:") else models


def find_groups(
    devices: DevicesConfig, models: ModelConfig, *, size: int = 1, report: Report | None = None
) -> list[Group]:
    """The groups that work on a stage's shards; no CUDA context is made.

    On the CPU: `devices.cpu_processes` groups, which share the cores that this process may use. With CUDA: groups of
    `size` GPUs each, of those that CUDA_VISIBLE_DEVICES (or the machine) has and that `devices.gpus` and `model.device`
    allow. A note names GPUs that are left over.

    Raises:
        UsageError: a GPU that does not exist, too few for one group, or settings that contradict each other.
    """
    from dice_py.models.loading import placement

    with cuda_unstarted():
        # With an explicit dtype: to choose one, torch would make a CUDA context here.
        device = placement(models.model_copy(update={"dtype": "float32"})).device
        visible = _visible_gpus() if device.startswith("cuda") else []
    if not device.startswith("cuda"):
        if devices.gpus != "all":
            raise UsageError(
                f"devices.gpus is {devices.gpus}, but the model is to be on {device} (model.device: {models.device}); "
                "leave devices.gpus out"
            )
        if size > 1:
            raise UsageError(
                f"generate.vllm.tensor_parallel_size is {size}, but model.device is {device}; set the first to 1"
            )
        if device != "cpu":
            return [Group(1)]
        threads = max(1, len(os.sched_getaffinity(0)) // devices.cpu_processes)
        return [Group(number + 1, threads=threads) for number in range(devices.cpu_processes)]
    used = _used_gpus(devices, models.device, len(visible))
    if len(used) < size:
        raise UsageError(
            f"generate.vllm.tensor_parallel_size is {size}, but the stage has {len(used)} GPU(s) to use (devices.gpus, "
            "model.device and CUDA_VISIBLE_DEVICES decide which); lower the first, or give it more"
        )
    chunks = [used[start : start + size] for start in range(0, len(used) - size + 1, size)]
    left = used[len(chunks) * size :]
    if left and report is not None:
        names = ", ".join(visible[gpu] for gpu in left)
        report("note", text=f"GPU(s) {names} stay idle: a group takes {size}")
    return [
        Group(number + 1, tuple(visible[gpu] for gpu in chunk), needs_process=chunk != list(range(size)))
        for number, chunk in enumerate(chunks)
    ]


def _visible_gpus() -> list[str]:
    """GPUs by the names that CUDA_VISIBLE_DEVICES has for them, in torch's order."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get(VISIBLE)
    if named is None:
        return [str(number) for number in range(count)]
    # CUDA stops reading at the first entry that it does not know.
    return [entry.strip() for entry in named.split(",")][:count]


def free_gpu_memory(gpus: Sequence[str]) -> int:
    """Free bytes of the fullest of these GPUs, which are named as in a `Group`. Makes a CUDA context on each."""
    import torch

    visible = _visible_gpus()
    return min(int(torch.cuda.mem_get_info(visible.index(gpu))[0]) for gpu in gpus)


def _used_gpus(devices: DevicesConfig, device: str, visible: int) -> list[int]:
    """Numbers of the visible GPUs that the stage may use."""
    visible_text = f"{visible} GPU(s) are visible, numbered from 0"
    listed = list(range(visible)) if devices.gpus == "all" else devices.gpus
    if not listed:
        raise UsageError(f"devices.gpus is an empty list; {visible_text}: name some, or 'all'")
    for gpu in listed:
        if gpu >= visible:
            raise UsageError(f"devices.gpus names GPU {gpu}, but {visible_text}; change it, or CUDA_VISIBLE_DEVICES")
        if listed.count(gpu) > 1:
            raise UsageError(f"devices.gpus names GPU {gpu} twice; a GPU belongs to one group")
    if not device.startswith("cuda:"):
        return listed
    number = device.removeprefix("cuda:")
    if not number.isdecimal() or int(number) >= visible:
        raise UsageError(f"model.device is {device!r}, but {visible_text}; change it, or CUDA_VISIBLE_DEVICES")
    if int(number) not in listed:
        raise UsageError(f"model.device is {device!r}, but devices.gpus is {listed}; leave one of them out")
    return [int(number)]


@contextlib.contextmanager
def only_these_gpus(group: Group) -> Iterator[None]:
    """Hides other GPUs from this process. Once CUDA has started this has no effect, but torch takes the first GPU."""
    torch = sys.modules.get("torch")
    before = os.environ.get(VISIBLE)
    hide = bool(group.gpus) and not (torch is not None and torch.cuda.is_initialized())
    if hide:
        os.environ[VISIBLE] = ",".join(group.gpus)
    try:
        yield
    finally:
        if hide and before is None:
            os.environ.pop(VISIBLE, None)
        elif hide and before is not None:
            os.environ[VISIBLE] = before
