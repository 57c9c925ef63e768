"""Samples the utilization and memory of the GPUs once a second, by NVML, in a thread of the run's process.

NVML makes no CUDA context, so the monitor holds no memory of a GPU. Where there is no NVIDIA driver, or NVML fails,
there are no figures and a sentence names the reason; that is never an error.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import Any

from dice_py.config.extras import missing_module
from dice_py.config.shared import DevicesConfig, ModelConfig

INTERVAL_SECONDS = 1.0
_STOP_SECONDS = 5.0  # limit of the wait for a driver that does not answer


@dataclass
class _Gpu:
    samples: int = 0
    idle: int = 0
    percent: int = 0  # summed
    peak: int | None = None
    memory: int | None = None

    def figures(self) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "idle_samples": self.idle,
            "idle_share": self.idle / self.samples if self.samples else None,
            "mean_utilisation": self.percent / self.samples / 100 if self.samples else None,
            "peak_memory_bytes": self.peak,
            "memory_bytes": self.memory,
        }


def usable_gpus(devices: DevicesConfig, models: ModelConfig) -> set[int] | None:
    """The numbers, as NVML counts, of the GPUs that a run may use; None: all of them.

    From `CUDA_VISIBLE_DEVICES` where it has numbers (names of GPUs are not looked up: all are watched then),
    `devices.gpus` and `model.device`. CUDA counts as NVML does where all GPUs are alike, and with
    `CUDA_DEVICE_ORDER=PCI_BUS_ID` anywhere.
    """
    kind, _, number = models.device.partition(":")
    if kind not in ("auto", "cuda"):
        return set()
    requested = [int(number)] if number.isdigit() else None if devices.gpus == "all" else list(devices.gpus)
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return None if requested is None else set(requested)
    visible = []
    for name in filter(None, (part.strip() for part in named.split(","))):
        if name.startswith("-"):
            break  # CUDA ignores the first entry that is no GPU, and all after it
        if not name.isdigit():
            return None
        visible.append(int(name))
    return set(visible if requested is None else [visible[at] for at in requested if at < len(visible)])


def gpu_names(gpus: set[int] | None) -> list[str]:
    """Names and memory of the GPUs `gpus` (None: all), by number; empty where NVML has none."""
    if gpus is not None and not gpus:
        return []
    import pynvml

    names = []
    try:
        pynvml.nvmlInit()
        try:
            for index in range(pynvml.nvmlDeviceGetCount()):
                if gpus is None or index in gpus:
                    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                    mib = pynvml.nvmlDeviceGetMemoryInfo(handle).total >> 20
                    names.append(f"{pynvml.nvmlDeviceGetName(handle)}, {mib} MiB")
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return []
    return names


class GpuMonitor:
    """A context manager that samples the GPUs `gpus` (None: all; an empty set: no thread is started)."""

    def __init__(self, gpus: set[int] | None = None) -> None:
        self._gpus = gpus
        self._lock = threading.Lock()
        self._seen: dict[int, _Gpu] = {}
        self._sampled = False  # at least one sample was read
        self._reason: str | None = None  # why there are no (more) samples
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> GpuMonitor:
        if self._gpus is not None and not self._gpus:
            self._reason = "the run may use none (model.device, devices.gpus, CUDA_VISIBLE_DEVICES)"
        else:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        if self._thread is not None:
            # The driver may not answer. The thread is a daemon, so it does not keep the process alive.
            self._thread.join(_STOP_SECONDS)

    def take(self) -> list[dict[str, Any]]:
        """The figures of each GPU since the last call, by number; without those that have no sample.

        `index`, `samples` (one a second), `idle_samples` (no kernel ran: a utilization of 0), `idle_share` and
        `mean_utilisation` in [0, 1] (None where the GPU does not report it, as with MIG), `peak_memory_bytes` in use
        (by any process) and `memory_bytes` in all.
        """
        with self._lock:
            seen, self._seen = self._seen, {}
        return [{"index": index, **gpu.figures()} for index, gpu in sorted(seen.items())]

    @property
    def problem(self) -> str | None:
        """Why there are no (more) figures; None while there are, or may yet be."""
        with self._lock:
            if self._reason is None:
                return None
            return f"{'GPU figures end' if self._sampled else 'no GPU seen'}: {self._reason}"

    def _run(self) -> None:
        try:
            import pynvml
        except ModuleNotFoundError as error:
            self._end(str(missing_module(error) or error))
            return
        try:
            pynvml.nvmlInit()
            try:
                self._sample_until_stopped(pynvml)
            finally:
                pynvml.nvmlShutdown()
        except pynvml.NVMLError as error:
            missing = isinstance(error, pynvml.NVMLError_LibraryNotFound)
            self._end("there is no NVIDIA driver" if missing else f"NVML: {error}")

    def _sample_until_stopped(self, nvml: Any) -> None:
        count = nvml.nvmlDeviceGetCount()
        indices = [index for index in range(count) if self._gpus is None or index in self._gpus]
        if not indices:
            self._end(f"NVML has {count} GPU(s), and none of those that the run may use")
            return
        handles = {index: nvml.nvmlDeviceGetHandleByIndex(index) for index in indices}
        while not self._stopping.is_set():
            for index, handle in handles.items():
                self._sample(nvml, index, handle)
            self._stopping.wait(INTERVAL_SECONDS)

    def _sample(self, nvml: Any, index: int, handle: Any) -> None:
        try:
            percent: int | None = nvml.nvmlDeviceGetUtilizationRates(handle).gpu
        except nvml.NVMLError_NotSupported:  # with MIG
            percent = None
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        with self._lock:
            self._sampled = True
            gpu = self._seen.setdefault(index, _Gpu())
            if percent is not None:
                gpu.samples += 1
                gpu.idle += percent == 0
                gpu.percent += percent
            gpu.peak = max(gpu.peak or 0, memory.used)
            gpu.memory = memory.total

    def _end(self, reason: str) -> None:
        with self._lock:
            self._reason = reason
