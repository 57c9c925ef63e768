"""The dtype that a trained policy is saved in, by what rounding would leave of its update (models/rounding.py).

A round that saves the start trains nothing, and the next one begins where it began.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dice_py.config.shared import ModelConfig
from dice_py.config.training import TrainConfig
from dice_py.errors import UsageError
from dice_py.models.loading import load_model
from dice_py.models.rounding import ENOUGH, Change
from dice_py.models.weight_files import weight_files
from dice_py.training.schedule import LEAST_CHANGE, warmup_steps

if TYPE_CHECKING:
    import torch


def start_weights(policy: Path, names: Iterable[str], models: ModelConfig) -> Callable[[str], torch.Tensor]:
    """The weights of a model folder by name: read one by one from its safetensors, else from the loaded model.

    The model is loaded where the files have other names than the module, or another format.
    """
    from safetensors import safe_open

    files: dict[str, Any] = {}
    # Only what transformers loads: an older sharding may lie beside it, with the same names.
    for file in (each for each in weight_files(policy) if each.suffix == ".safetensors"):
        handle = safe_open(file, framework="pt")
        files |= dict.fromkeys(handle.keys(), handle)
    if all(name in files for name in names):
        return lambda name: files[name].get_tensor(name)
    on_cpu = models.model_copy(update={"dtype": "float32"})
    state = load_model(policy, on_cpu, training=True).state_dict()
    return lambda name: state[name]


def check_update(
    update: Change, config: TrainConfig, stored: torch.dtype, steps: int
) -> tuple[torch.dtype, str | None]:
    """The dtype to save the policy in, and a note if that is not plainly the stored one, or the update is next to none.

    Args:
        update: measured with the rounding to `stored`.
        stored: dtype of the start's files.
        steps: optimizer steps of the training.

    Raises:
        UsageError: the policy did not change, or would not in the dtype that train.save_dtype asks for.
    """
    settings = (
        f"train.learning_rate is {config.learning_rate:g}, and the training had {steps} step{'s' * (steps != 1)}, "
        f"of which train.warmup_steps={config.warmup_steps} took {min(warmup_steps(config, steps), steps)}"
    )
    if not update.largest:
        raise UsageError(
            f"the training changed no weight of the policy, so the round would end where it began: {settings}. Raise "
            "the learning rate, lower train.warmup_steps, or train on more pairs"
        )
    dtype, note = _save_dtype(update, config, stored, settings)
    if update.largest < LEAST_CHANGE:
        least = (
            f"warning: no weight of the policy changed by more than {update.largest:.1e}, so the round ends where it "
            f"began: {settings}, train.max_grad_norm is {config.max_grad_norm:g}. Raise the learning rate"
        )
        note = least if note is None else f"{note}. {least}"
    return dtype, note


def _save_dtype(
    update: Change, config: TrainConfig, stored: torch.dtype, settings: str
) -> tuple[torch.dtype, str | None]:
    import torch

    name = str(stored).removeprefix("torch.")
    if config.save_dtype == "float32":
        return torch.float32, None
    lost = f"rounding to {name}, the dtype of the start, leaves {max(0.0, update.kept):.0%} of the update"
    if config.save_dtype == "auto":
        if update.kept >= ENOUGH:
            return stored, None
        return torch.float32, (
            f"{lost} (largest change of a weight {update.largest:.1e}), so the policy is saved in float32; "
            "train.save_dtype=stored rounds it all the same"
        )
    if not update.kept:
        raise UsageError(
            f"{lost}: the saved policy would be the start ({settings}, largest change of a weight "
            f"{update.largest:.1e}). Set train.save_dtype=float32 or auto, or raise the learning rate"
        )
    return stored, f"warning: {lost}; train.save_dtype=float32 keeps it" if update.kept < ENOUGH else None
