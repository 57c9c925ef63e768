"""Copies of a tiny model in which something is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dice_py.config.shared import ModelConfig
from dice_py.errors import DiceError
from dice_py.models.checkpoint import check_checkpoint

WEIGHTS = "model.safetensors"
CPU = ModelConfig(device="cpu")


def copy_of(model: Path, folder: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(model, folder / "copy"))


def change_config(folder: Path, name: str = "config.json", **values: Any) -> Path:
    """Sets entries of a JSON file; None removes one."""
    content = {**json.loads((folder / name).read_text()), **values}
    (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return folder


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], name: str = WEIGHTS) -> Path:
    """Writes the tensors of a file as `change` leaves them, in place or in a new dict that it returns."""
    weights = load_file(folder / name)
    changed = change(weights)
    save_file(changed if isinstance(changed, dict) else weights, folder / name, metadata={"format": "pt"})
    return folder


def as_bin(folder: Path) -> Path:
    """Turns the weights into pytorch_model.bin."""
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    return folder


def in_shards(folder: Path, reverse: bool = False) -> list[Path]:
    """Turns the weights into two shards and an index; returns the shards."""
    weights = load_file(folder / WEIGHTS)
    names = sorted(weights, reverse=reverse)
    half = len(names) // 3 if reverse else len(names) // 2
    shards = {"model-00001-of-00002.safetensors": names[:half], "model-00002-of-00002.safetensors": names[half:]}
    for shard, held in shards.items():
        save_file({name: weights[name] for name in held}, folder / shard, metadata={"format": "pt"})
    placed = {name: shard for shard, held in shards.items() for name in held}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    (folder / WEIGHTS).unlink()
    return [folder / shard for shard in shards]


def refusal(folder: Path, code: int = 3, config: ModelConfig = CPU) -> str:
    """The sentence with which a folder is refused, which begins with the model's role."""
    with pytest.raises(DiceError) as caught:
        check_checkpoint(folder, "the model", config)
    assert caught.value.exit_code == code, caught.value
    return str(caught.value)
