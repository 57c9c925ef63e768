"""The machine: what it is, what is installed, its rates, and what the project's own examination says of it."""

from __future__ import annotations

import importlib.metadata
import inspect
import shutil
import subprocess
import time

from gpu.context import Check, seconds_of

SMI = (
    "name,driver_version,memory.total,memory.used,clocks.sm,clocks.max.sm,power.limit,temperature.gpu,mig.mode.current"
)


def machine(check: Check) -> None:
    """`dice doctor`, the groups of devices, matrix rates, the memory's rate, the monitor, and the world's origin."""
    import torch
    from shapes import machine as describe
    from torch.nn.attention.varlen import varlen_attn

    from dice_py.compute.devices import find_groups
    from dice_py.compute.gpu_monitor import GpuMonitor, usable_gpus
    from dice_py.config.shared import DevicesConfig, ModelConfig
    from dice_py.doctor import examine
    from dice_py.models.flops import matmul_rate
    from dice_py.models.loading import placement

    figures = check.figures
    figures["machine"], figures["doctor"] = describe(), examine()
    figures["placement"] = str(placement(ModelConfig()))
    figures["groups"] = str(find_groups(DevicesConfig(), ModelConfig()))
    figures["varlen_attn"] = str(inspect.signature(varlen_attn))
    packages = ("torch", "triton", "transformers", "trl", "accelerate", "datasets", "peft", "polars", "numpy", "pytest")
    figures["versions"] = {name: _version(name) for name in packages}
    if smi := shutil.which("nvidia-smi"):
        done = subprocess.run([smi, f"--query-gpu={SMI}", "--format=csv,noheader"], capture_output=True, text=True)
        figures["nvidia_smi"] = (done.stdout or done.stderr).strip()
    figures["compiler"] = shutil.which("gcc") or shutil.which("cc")  # with which Triton builds its launcher
    figures["world"] = adopt_world()
    check.save()
    device = torch.device(check.device)
    with GpuMonitor(usable_gpus(DevicesConfig(), ModelConfig())) as monitor:
        for dtype in (torch.float32,) if check.cpu else (torch.bfloat16, torch.float32):
            name = str(dtype).removeprefix("torch.")
            figures[f"{name}_tflops"] = round(matmul_rate(device, dtype) / 1e12, 3)
        if not check.cpu:
            source = torch.empty(2**30, dtype=torch.uint8, device=device).random_()
            target = torch.empty_like(source)
            seconds = seconds_of(lambda: target.copy_(source), 10, check.cpu)
            figures["copy_tb_per_s"] = round(2 * source.numel() / seconds / 1e12, 3)
            time.sleep(2.5)  # the monitor samples once a second
        figures["monitor"], figures["monitor_problem"] = monitor.take(), monitor.problem


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def adopt_world() -> str:
    """Uses the world that the kit carries also where its key differs, by other builds of the same packages.

    Returns:
        Where the world of later parts comes from.
    """
    from dice_py.config.stages import WorldConfig
    from dice_py.storage.cache import cache_folder
    from dice_py.synthetic.world import find_world, world_key

    if find_world(WorldConfig()) is not None:
        return "there under its key"
    carried = sorted((cache_folder() / "world").glob("*/world.json"))
    if not carried:
        return "none: the run makes it"
    (cache_folder() / "world" / world_key(WorldConfig())).symlink_to(carried[0].parent)
    return f"carried under the key {carried[0].parent.name}, used under {world_key(WorldConfig())}"
