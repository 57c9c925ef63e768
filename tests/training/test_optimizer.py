"""The optimizer that a training gets from its settings."""

from __future__ import annotations

from pathlib import Path

from tiny_sets import CPU
from transformers import Trainer, TrainingArguments

from dice_py.config.training import TrainConfig
from dice_py.training.trainer import trainer_arguments


def test_default_is_the_fused_optimizer_of_transformers_on_every_device(tmp_path: Path) -> None:
    """One name for all devices: a key that names it stands for one optimizer, wherever a run is resumed."""
    arguments = trainer_arguments(TrainConfig(), CPU, tmp_path, beta=0.1, seed=0, pairs=64)
    assert arguments.optim == TrainingArguments.__dataclass_fields__["optim"].default
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    assert kind.__name__ == "AdamW"
    assert options["fused"] is True
    assert TrainConfig().key_fields()["optim"] == "adamw_torch_fused"
