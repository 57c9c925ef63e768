"""The config of the tests of the vLLM engine."""

from __future__ import annotations

from typing import Any

from dice_py.config.stages import GenerateConfig

MAX_NEW = 24
PLAIN = GenerateConfig.model_validate(
    {"engine": "vllm", "samples": 4, "temperature": 1.0, "max_new_tokens": MAX_NEW, "shard_prompts": 2}
)


def changed_config(config: GenerateConfig, **values: Any) -> GenerateConfig:
    return GenerateConfig.model_validate({**config.model_dump(), **values})
