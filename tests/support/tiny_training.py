"""The training stage on eight pairs, and one step of a trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from tiny_sets import CPU

from dice_py.config.shared import DevicesConfig
from dice_py.config.training import TrainConfig
from dice_py.stages.train import TrainJob
from dice_py.storage.parquet import write_parquet
from dice_py.training.pair_trainer import PairTrainer

PAIRS = 8
CONFIG = TrainConfig(
    learning_rate=1e-3,
    lr_scheduler_type="cosine",
    warmup_steps=0,
    num_train_epochs=3.0,
    batch_size=4,
    per_device_train_batch_size=2,
    save_steps=None,
    logging_steps=1,
)


class Stage:
    """The stage, with defaults for everything that a test does not set. `on_step` is called after each step."""

    def __init__(self, policy: Path, pairs: pl.DataFrame, folder: Path) -> None:
        self.policy, self.pairs, self.folder, self.out = policy, pairs, folder, folder / "train"
        self.model = self.out / "model"
        self.models = CPU
        self.devices: DevicesConfig | None = None
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.on_step: Callable[[int], None] = lambda step: None

    def __call__(self, pairs: pl.DataFrame | None = None, key: str = "k", **changed: Any) -> dict[str, Any]:
        self.events.clear()
        write_parquet(self.folder / "training_set.parquet", self.pairs if pairs is None else pairs, key="mixed")
        return self.job(key, **changed).run(self.report).counts

    def job(self, key: str = "k", **changed: Any) -> TrainJob:
        """`key`: of the training set. The job's own key depends on it."""
        return TrainJob(
            CONFIG.model_copy(update=changed),
            self.models,
            policy=self.policy,
            training_set=self.folder / "training_set.parquet",
            training_set_key=key,
            out=self.out,
            beta=0.1,
            seed=7,
            devices=self.devices,
        )

    def report(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))
        if event == "progress":
            self.on_step(fields["done"])

    def interrupt(self, at: int, **changed: Any) -> None:
        """Trains, and interrupts the training after the step `at`."""

        def stop(step: int) -> None:
            if step == at:
                raise KeyboardInterrupt

        self.on_step = stop
        with pytest.raises(KeyboardInterrupt):
            self(**changed)
        self.on_step = lambda step: None

    def steps(self) -> list[int]:
        """The steps of the last call."""
        return [fields["done"] for event, fields in self.events if event == "progress"]

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.model / "model.safetensors")


def step_of(made: PairTrainer) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of a step on all pairs, and its gradients."""
    made.create_optimizer_and_scheduler(1)
    made.current_gradient_accumulation_steps = 1
    pairs = [made.train_dataset[row] for row in range(len(made.train_dataset))]
    loss = made.training_step(made.model, made.data_collator(pairs))
    return loss.item(), {
        name: value.grad.clone() for name, value in made.model.named_parameters() if value.grad is not None
    }
