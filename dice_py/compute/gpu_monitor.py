"""What the GPUs do meanwhile: one sample a second of each, read from `nvidia-smi` by a thread of the run's process.

Nothing of CUDA is loaded here, so the watch holds no memory of a GPU. Without `nvidia-smi`, or where it fails, there
are no figures and a sentence says why; that is never an error.

`nvidia-smi` does not outlive the run: leaving the context ends it, and where the run's process is killed, the pipe that
it writes to has no reader any more, so its next line, within a second, ends it (SIGPIPE).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from dataclasses import dataclass
from typing import Any

from dice_py.config.shared import DevicesConfig, ModelConfig

_COMMAND = [
    "nvidia-smi",
    "--query-gpu=index,utilization.gpu,memory.used,memory.total",
    "--format=csv,noheader,nounits",
    "-lms",
    "1000",
]
_MIB = 1 << 20
_END_SECONDS = 5.0  # how long it may take to end when told to


@dataclass
class _Gpu:
    samples: int = 0
    idle: int = 0
    percent: int = 0  # added up
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
    """The numbers, as `nvidia-smi` counts, of the GPUs that a run may use; None: all that there are.

    From `CUDA_VISIBLE_DEVICES` where it has numbers (names of GPUs are not looked up: all are watched then),
    `devices.gpus` and `model.device`. CUDA counts as `nvidia-smi` does where all GPUs are alike, and with
    `CUDA_DEVICE_ORDER=PCI_BUS_ID` anywhere.
    """
    kind, _, number = models.device.partition(":")
    if kind not in ("auto", "cuda"):
        return set()
    asked = [int(number)] if number.isdigit() else None if devices.gpus == "all" else list(devices.gpus)
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return None if asked is None else set(asked)
    visible = []
    for name in filter(None, (part.strip() for part in named.split(","))):
        if name.startswith("-"):
            break  # CUDA takes what stands before the first one that is none
        if not name.isdigit():
            return None
        visible.append(int(name))
    return set(visible if asked is None else [visible[at] for at in asked if at < len(visible)])


class GpuMonitor:
    """A context manager that watches the GPUs `gpus` (None: all; none of them: nothing is started)."""

    def __init__(self, gpus: set[int] | None = None) -> None:
        self._gpus = gpus
        self._lock = threading.Lock()
        self._seen: dict[int, _Gpu] = {}
        self._ever = False
        self._unread: str | None = None  # the first line that was no sample
        self._ended: str | None = None
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None

    def __enter__(self) -> GpuMonitor:
        if self._gpus is not None and not self._gpus:
            self._ended = "the run may use none (model.device, devices.gpus, CUDA_VISIBLE_DEVICES)"
            return self
        try:
            self._process = subprocess.Popen(
                _COMMAND,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="utf-8",
                errors="replace",
                process_group=0,  # Ctrl-C is for the run, which needs the last samples
            )
        except FileNotFoundError:
            self._ended = "nvidia-smi is not installed"
        except OSError as error:
            self._ended = f"nvidia-smi cannot be started ({error.strerror})"
        else:
            self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
            self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is None or self._reader is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # it waits for a driver that does not answer
                self._process.wait(_END_SECONDS)
        # A process that it left behind may hold the pipe open: the thread, a daemon, is not waited for then.
        self._reader.join(_END_SECONDS)

    def take(self) -> list[dict[str, Any]]:
        """The figures of each GPU since the last call, by number; without those that gave no sample.

        `index`, `samples` (one a second), `idle_samples` (no kernel ran: a utilisation of 0), `idle_share` and
        `mean_utilisation` in [0, 1] (None where the GPU does not tell, as with MIG), `peak_memory_bytes` in use
        (by anyone) and `memory_bytes` in all.
        """
        with self._lock:
            seen, self._seen = self._seen, {}
        return [{"index": index, **gpu.figures()} for index, gpu in sorted(seen.items())]

    @property
    def problem(self) -> str | None:
        """Why there are no (more) figures; None while there are, or may yet be."""
        with self._lock:
            said = None if self._ever or self._unread is None else f"nvidia-smi says: {self._unread}"
            reason = "; ".join(filter(None, (self._ended, said)))
            return f"{'GPU figures end' if self._ever else 'no GPU seen'}: {reason}" if reason else None

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                self._sample(line)
        code = process.wait()
        with self._lock:
            self._ended = f"nvidia-smi ended with exit code {code}"

    def _sample(self, line: str) -> None:
        parts = [part.strip() for part in line.split(",")]
        if len(parts) != 4 or not parts[0].isdigit():
            with self._lock:
                self._unread = self._unread or line.strip()[:200] or None
            return
        # What a GPU does not tell reads "[N/A]".
        index, percent, used, total = (int(part) if part.isdigit() else None for part in parts)
        assert index is not None
        if self._gpus is not None and index not in self._gpus:
            return
        with self._lock:
            self._ever = True
            gpu = self._seen.setdefault(index, _Gpu())
            if percent is not None:
                gpu.samples += 1
                gpu.idle += percent == 0
                gpu.percent += percent
            if used is not None:
                gpu.peak = max(gpu.peak or 0, used * _MIB)
            gpu.memory = gpu.memory if total is None else total * _MIB
