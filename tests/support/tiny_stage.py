"""The scoring stage on two shards of generations, with everything but what a test is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from logp_oracle import mixed
from tiny_sets import CPU, IDS
from transformers import PreTrainedModel

from dice_py.config.stages import ScoreConfig
from dice_py.models.loading import held_model
from dice_py.scoring import gate, shards
from dice_py.stages.score import ScoreJob
from dice_py.storage.parquet import write_parquet

BETA = 0.25
KEYS = ["key of shard 0", "key of shard 1"]


@dataclass(frozen=True)
class KeyedJob(ScoreJob):
    """A job whose shards have keys that a test gives, whatever else changes."""

    def shard_keys(self) -> list[str]:
        return self.generation_keys


@dataclass(frozen=True)
class Scored:
    """What the stage leaves: the files, and the figures of the gate."""

    files: list[Path]
    gate: dict[str, Any] | None
    dtype: str


class Stage:
    """Two shards of five and four rows; the fourth row of the first has no response.

    Calling it scores them. `**changed` are fields of the job, `keys` the keys of the shards, `config` entries of the
    config.
    """

    def __init__(self, policy: Path, reference: Path, folder: Path) -> None:
        self.policy, self.reference, self.out = policy, reference, folder / "score"
        self.generations = [folder / "generations-00000.parquet", folder / "generations-00001.parquet"]
        prompts, responses = mixed(9, longest=12)
        responses[3] = []  # a model may stop at once
        frame = pl.DataFrame(
            {"prompt_token_ids": prompts, "token_ids": responses},
            schema={"prompt_token_ids": IDS, "token_ids": IDS},
        )
        self.frames = [frame[:5], frame[5:]]
        self.write()
        self.files = [self.out / "scores-00000.parquet", self.out / "scores-00001.parquet"]
        self.halves = [self.out / "ref-logps-00000.parquet", self.out / "ref-logps-00001.parquet"]
        self.gate_file = self.out / "gate.json"
        self.events: list[tuple[str, dict[str, Any]]] = []

    def write(self) -> None:
        """Writes the generations anew from `frames`."""
        for file, part in zip(self.generations, self.frames, strict=True):
            write_parquet(file, part, key="generated")

    def came_with(self, *logps: Sequence[float | None]) -> None:
        """Adds `sampled_logp` to the shards."""
        for number, values in enumerate(logps):
            column = pl.Series("sampled_logp", values, dtype=pl.Float32)
            self.frames[number] = self.frames[number].with_columns(column)
        self.write()

    def __call__(self, config: dict[str, Any] | None = None, **changed: Any) -> Scored:
        self.events.clear()
        arguments: dict[str, Any] = {
            "policy": self.policy,
            "reference": self.reference,
            "generations": self.generations,
            "out": self.out,
            "generation_keys": changed.pop("keys", KEYS),
            "beta": BETA,
            **changed,
        }
        job = KeyedJob(ScoreConfig(**{"token_budget": 60, **(config or {})}), CPU, **arguments)
        result = job.run(self._on_event)
        return Scored([file for file, _ in result.files], result.counts["policy_logps_gate"], result.counts["dtype"])

    def _on_event(self, event: str, **fields: Any) -> None:
        # The two models are initialized apart, of which every call warns.
        if "share no history" not in fields.get("text", ""):
            self.events.append((event, fields))

    def of(self, event: str, field: str) -> list[Any]:
        """A field of each event of a kind, of the last call."""
        return [fields[field] for kind, fields in self.events if kind == event]

    def scores(self) -> list[pl.DataFrame]:
        return [pl.read_parquet(file) for file in self.files]

    def column(self, name: str) -> list[np.ndarray]:
        return [frame[name].to_numpy() for frame in self.scores()]


def refuse(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    """Asking for a model of one of `folders` raises KeyboardInterrupt."""

    def held(folder: Path, *rest: Any) -> PreTrainedModel:
        if folder in folders:
            raise KeyboardInterrupt
        return held_model(folder, *rest)

    for module in (shards, gate):
        monkeypatch.setattr(module, "held_model", held)
