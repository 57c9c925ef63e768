"""The generation stage on a few prompts, with defaults for everything that a test does not set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from dice_py.config.shared import ModelConfig
from dice_py.config.stages import GenerateConfig
from dice_py.stages.generate import GenerateJob
from dice_py.stages.job import StageResult

CPU = ModelConfig(device="cpu")
CONFIG = GenerateConfig(engine="transformers", samples=3, temperature=1.0, max_new_tokens=8, shard_prompts=2)


def questions(count: int, first: int = 0) -> pl.DataFrame:
    """`count` prompts of growing length, ids 10, 11, …"""
    rows = range(first, first + count)
    return pl.DataFrame(
        {
            "prompt_id": [10 + n for n in rows],
            "messages": [[{"role": "user", "content": "why? " * (n + 1)}] for n in rows],
        },
        schema_overrides={"prompt_id": pl.UInt32},
    )


class Stage:
    """The stage, with defaults for everything that a test does not set."""

    def __init__(self, policy: Path, out: Path) -> None:
        self.arguments: dict[str, Any] = {
            "policy": policy,
            "prompts": questions(5),
            "prompts_key": "questions",
            "out": out,
            "seed": 0,
            "round_number": 1,
            "max_prompt_tokens": 100,
        }
        self.out = out
        self.events: list[tuple[str, dict[str, Any]]] = []

    def job(self, config: GenerateConfig = CONFIG, models: ModelConfig = CPU, **changed: Any) -> GenerateJob:
        return GenerateJob(config, models, **{**self.arguments, **changed})

    def __call__(self, config: GenerateConfig = CONFIG, models: ModelConfig = CPU, **changed: Any) -> StageResult:
        self.events.clear()
        return self.job(config, models, **changed).run(lambda event, **fields: self.events.append((event, fields)))

    def written(self) -> list[str]:
        """Names of the shards that the last call wrote."""
        return [fields["file"] for event, fields in self.events if event == "shard"]

    def files(self) -> list[Path]:
        """The stage's shards, in order."""
        return sorted(self.out.glob("*.parquet"))

    def frame(self) -> pl.DataFrame:
        return pl.concat([pl.read_parquet(file) for file in self.files()])


def shard(number: int) -> str:
    return f"generations-{number:05d}.parquet"
