"""How often the host waits for a GPU while it trains: not at all in a packed step, and rarely in between.

A GPU that is waited for has no work queued, and stands still until the host has queued more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from device_traffic import HostReads, Traffic
from tiny_sets import CPU, scored_pairs

from dice_py.config.training import TrainConfig
from dice_py.models.packed_attention import DeviceLayout
from dice_py.models.packing import PackedLayout
from dice_py.training.pair_trainer import PairTrainer
from dice_py.training.trainer import build_trainer

pytestmark = pytest.mark.slow

META = torch.device("meta")
COUNT = 12


@pytest.fixture(scope="module")
def pairs(llama: Path) -> pl.DataFrame:
    return scored_pairs(llama, COUNT)


def build(policy: Path, pairs: pl.DataFrame, folder: Path, **changed: Any) -> PairTrainer:
    config = TrainConfig(batch_size=COUNT, per_device_train_batch_size=COUNT, save_steps=None, warmup_steps=0)
    config = config.model_copy(update=changed)
    return build_trainer(config, CPU, policy=policy, pairs=pairs, folder=folder, beta=0.1, seed=0)


@pytest.mark.parametrize("sft_weight", [0.0, 0.5])
def test_packed_step_reads_nothing_and_waits_for_no_copy(
    llama: Path, pairs: pl.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sft_weight: float
) -> None:
    """On the meta device: reading a value, or a shape that depends on values, raises an error."""
    trainer = build(llama, pairs, tmp_path, sft_weight=sft_weight, packed_tokens=60)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.to(META)
    monkeypatch.setattr(trainer.accelerator.state, "device", META)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type=None: False)  # which knows no meta device
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(COUNT)])
    with Traffic() as traffic:
        loss = trainer.training_step(trainer.model, batch)
    assert loss.device == META
    assert len(trainer.packing[0]["pairs"]) > 2
    assert all(weight.grad is not None for weight in trainer.model.parameters())
    assert traffic.copies
    assert traffic.blocking == []


def test_layout_of_the_flash_kernel_waits_for_no_copy() -> None:
    layout = PackedLayout(np.array([[0, 3]]), np.array([[3, 2, 0, 3], [5, 4, 0, 3]]))
    with Traffic() as traffic:
        keys, *_ = DeviceLayout(layout, META).varlen()
    assert keys.device == META
    assert len(traffic.copies) > traffic.copies.count("aten::lift_fresh") > 0
    assert traffic.blocking == []


def reads(policy: Path, pairs: pl.DataFrame, folder: Path, **changed: Any) -> tuple[int, int]:
    """(reads on the host, packed rows) of a training of `max_steps` steps that logs at its end alone."""
    trainer = build(policy, pairs, folder, logging_steps=1000, sft_weight=0.5, **changed)
    with HostReads() as host:
        trainer.train()
    assert len(trainer.packing) == changed["max_steps"]
    return len(host.reads), sum(len(step["pairs"]) for step in trainer.packing)


def test_neither_rows_nor_steps_add_reads(llama: Path, pairs: pl.DataFrame, tmp_path: Path) -> None:
    """What remains is the loss, and TRL's and our metrics, each time that they are logged."""
    counts = {
        name: reads(llama, pairs, tmp_path, **changed)
        for name, changed in {
            "one row": {"max_steps": 2, "packed_tokens": 4096},
            "many rows": {"max_steps": 2, "packed_tokens": 60},
            "more steps": {"max_steps": 6, "packed_tokens": 60},
        }.items()
    }
    assert counts["one row"][1] == 2
    assert counts["more steps"][1] == 3 * counts["many rows"][1] > 12
    epochs = 4  # the loader draws a seed for each epoch, on the host
    assert counts["many rows"][0] == counts["one row"][0] <= 16
    assert counts["more steps"][0] == counts["many rows"][0] + epochs
