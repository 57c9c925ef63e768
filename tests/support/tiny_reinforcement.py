"""Stage 2 of MPO on a few hard prompts, with defaults for everything that a test does not set."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
from tiny_sets import CPU, FIRST, IDS, LAST, draw_ids

from dice_py.config.mpo import MpoConfig
from dice_py.config.stages import GenerateConfig, ScoreConfig
from dice_py.config.training import TrainConfig
from dice_py.reinforcement.rewards import ImplicitRewards, LengthPenalty, Responses
from dice_py.stages.reinforce import ReinforceJob
from dice_py.storage.parquet import write_parquet
from dice_py.storage.schemas import MESSAGES

BETA = 0.25
MPO = MpoConfig(steps=3, batch_size=8, num_generations=4, per_device_train_batch_size=4, learning_rate=1e-3)
CONFIG = TrainConfig(
    method="mpo",
    lr_scheduler_type="constant",
    warmup_steps=0,
    batch_size=4,
    per_device_train_batch_size=2,
    save_steps=1,
    logging_steps=1,
    mpo=MPO,
)
# A tiny model with random weights hardly ever ends by itself.
STOPS = list(range(FIRST, LAST, 3))
GENERATE = GenerateConfig(
    engine="transformers",
    temperature=1.0,
    max_new_tokens=24,
    token_budget=400,
    sampling_params={"stop_token_ids": STOPS},
)


def training_set(difficulties: list[str | None], sources: list[str] | None = None) -> pl.DataFrame:
    """The columns of a training set that stage 2 reads, a row for each difficulty, each with a prompt of its own."""
    rng = random.Random(3)
    return pl.DataFrame(
        {
            "prompt": [[{"role": "user", "content": f"question {row}"}] for row in range(len(difficulties))],
            "prompt_ids": [draw_ids(rng, rng.randint(2, 8)) for _ in difficulties],
            "source": sources or ["mined"] * len(difficulties),
            "difficulty": difficulties,
        },
        schema={"prompt": MESSAGES, "prompt_ids": IDS, "source": pl.String, "difficulty": pl.String},
    )


def implicit(policy: Path, reference: Path, penalty: LengthPenalty | None = None) -> ImplicitRewards:
    """The reward of two tiny models."""
    return ImplicitRewards(
        policy, reference, ScoreConfig(token_budget=200), CPU, BETA, penalty or LengthPenalty("linear", "tokens", 0.1)
    )


def responses(prompts: list[list[int]], answers: list[list[int]], texts: list[str] | None = None) -> Responses:
    """Responses of which each has a prompt of its own."""
    messages = [[{"role": "user", "content": f"question {row}"}] for row in range(len(prompts))]
    return Responses(
        prompts, answers, texts or [""] * len(answers), list(range(len(prompts))), pl.Series(messages, dtype=MESSAGES)
    )


class Stage:
    """The stage on three hard prompts and an easy one. `on_step` is called after each step."""

    def __init__(self, policy: Path, reference: Path, folder: Path) -> None:
        self.policy, self.reference, self.folder, self.out = policy, reference, folder, folder / "reinforce"
        self.model = self.out / "model"
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.on_step: Callable[[int], None] = lambda step: None
        self.frame = training_set(["hard", "easy", "hard", "hard"])

    def job(
        self, mpo: dict[str, Any] | None = None, generate: dict[str, Any] | None = None, **fields: Any
    ) -> ReinforceJob:
        """`mpo`, `generate`: changed settings; `fields`: of the job."""
        file = write_parquet(self.folder / "training_set.parquet", self.frame, key="mixed")
        arguments: dict[str, Any] = {
            "config": CONFIG.model_copy(update={"mpo": MPO.model_copy(update=mpo or {})}),
            "generate": GENERATE.model_copy(update=generate or {}),
            "models": CPU,
            "policy": self.policy,
            "training_set": file,
            "training_set_key": "k",
            "rewards": implicit(self.policy, self.reference),
            "out": self.out,
            "seed": 7,
        }
        return ReinforceJob(**arguments | fields)

    def __call__(self, **changed: Any) -> dict[str, Any]:
        """Runs the job; returns its counts."""
        self.events.clear()
        return self.job(**changed).run(self.report).counts

    def report(self, event: str, **fields: Any) -> None:
        """Collects events."""
        self.events.append((event, fields))
        if event == "progress" and fields["stage"] == "reinforce":
            self.on_step(fields["done"])

    def notes(self) -> list[str]:
        """The notes of the last call."""
        return [fields["text"] for event, fields in self.events if event == "note"]
