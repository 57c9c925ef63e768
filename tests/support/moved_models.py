"""A model whose weights have moved, as after a training."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dice_py.models.weight_files import weight_files

Weights = dict[str, torch.Tensor]


def weights(folder: Path) -> Weights:
    """All weights of a model folder by name."""
    return {name: value for file in weight_files(folder) for name, value in load_file(file).items()}


def trained(start: Path, folder: Path, scale: float = 0.01, **saving: Any) -> Path:
    """A copy of a model whose weights have moved by a normal number times `scale`, saved anew. Returns `folder`."""
    shutil.copytree(start, folder)
    model = AutoModelForCausalLM.from_pretrained(start)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value += scale * torch.randn(value.shape, generator=generator)
    for file in weight_files(folder):
        file.unlink()
    model.save_pretrained(folder, **saving)
    return folder


def expected(start: Weights, after: Weights, alpha: float) -> Weights:
    """θ₁ + α·(θ₁ − θ₀) in float32, stored as θ₁."""
    return {
        name: (value.float() + alpha * (value.float() - start[name].float())).to(value.dtype)
        for name, value in after.items()
    }


def assert_equal(found: Weights, wanted: Weights) -> None:
    """The same names, dtypes and bits."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name
