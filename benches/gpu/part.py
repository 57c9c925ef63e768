"""One part in a process of its own: its output goes to the log, its figures to a file."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

from gpu.context import Check, PartError, first_line

NO_GPU_AFTER_FORK = 77
"""Exit code: something that was imported ahead started CUDA, which then cannot be used in a forked process."""
NVML_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"
"""Makes torch count GPUs without starting CUDA."""


@dataclass(frozen=True)
class Part:
    """Where a part is, and how long it may take."""

    module: str
    seconds: float


# In the order of what must not be missed: the budget cuts the end off.
PARTS = {
    "machine": Part("machine", 60),
    "attention": Part("attention", 60),
    "parity": Part("scoring", 60),
    "scoring": Part("scoring", 130),
    "training": Part("training", 110),
    "run": Part("commands", 170),
    "gpu_tests": Part("commands", 60),
    "generation": Part("sampling", 80),
    "lora": Part("training", 150),
    "draw": Part("sampling", 30),
    "reinforcement": Part("reinforcement", 120),
    "fsdp": Part("commands", 60),
}


def run_part(check: Check, log: Path, forked: bool) -> None:
    """Runs one part and ends the process: 0, 1 for a part that failed, or `NO_GPU_AFTER_FORK`."""
    os.setsid()  # so that it can be stopped with all that it started
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.pop(NVML_CHECK, None)
    if forked and not check.cpu and not _gpu_answers():
        sys.exit(NO_GPU_AFTER_FORK)
    print(f"\n===== {check.name}{'' if 'trl' in sys.modules else ' (nothing was imported ahead)'}", flush=True)
    try:
        getattr(importlib.import_module(f"gpu.parts.{PARTS[check.name].module}"), check.name)(check)
    except PartError as failure:
        check.error = str(failure)
    except BaseException as error:
        check.error = first_line(error)
        traceback.print_exc()
    check.save()
    sys.exit(0 if check.error is None else 1)


def _gpu_answers() -> bool:
    import torch

    try:
        torch.zeros(1, device="cuda")
    except RuntimeError as error:
        print(f"no GPU in a forked process: {first_line(error)}", flush=True)
        return False
    return True
