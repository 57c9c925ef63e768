"""What is optional: the extra that brings each module, and the error where one is missing.

The miner, the replay sampler and `dice mine` need none of these. Which module a command lacks is known when it
is first imported, so `missing_module` turns that ImportError into a sentence; `require` is for work that must not begin
without all of its modules.
"""

from __future__ import annotations

import importlib.util

from dice_py.errors import UsageError

EXTRAS: dict[str, tuple[str, ...]] = {
    "train": (
        "torch", "transformers", "trl", "accelerate", "datasets", "peft", "gguf", "huggingface_hub", "safetensors",
        "tokenizers", "numpy", "scipy", "threadpoolctl", "pynvml", "jinja2", "markupsafe", "altair", "vl_convert",
    ),
    "judge": ("openai",),
    "vllm": ("vllm",),
    "ray": ("ray",),
    "tracking": ("tensorboard", "trackio"),
}  # fmt: skip
"""Modules by the extra that a command without them names. An extra may bring modules of an earlier one, too."""

TRAINING = ("torch", "transformers", "trl", "accelerate", "datasets")
"""What a run and its training need in any case."""


def require(*modules: str, extra: str) -> None:
    """Checks that modules of an optional dependency set (`extra`) are installed.

    Raises:
        UsageError: a module is missing; the message has the command that installs it.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"{', '.join(missing)} is not installed; add it with: {install(extra)}")


def install(extra: str) -> str:
    """The command that installs an extra."""
    return f"pip install 'dice-align[{extra}]'"


def missing_module(error: BaseException) -> UsageError | None:
    """The error to show for an ImportError of a module that an extra brings and that is not installed; else None."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return None
    module = error.name.partition(".")[0]
    for extra, modules in EXTRAS.items():
        if module in modules and importlib.util.find_spec(module) is None:
            return UsageError(f"{module} is not installed; add it with: {install(extra)}")
    return None
