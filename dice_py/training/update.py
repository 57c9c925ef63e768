"""How far a training moved the weights, and how much of it is left when they are rounded to another dtype.

At DPO's learning rates an update is small: of a start in bfloat16, which has 8 bits, rounding to bfloat16 may give the
start again. A round that saves the start trains nothing, and the next one begins where it began.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dice_py.config.shared import ModelConfig
from dice_py.config.training import TrainConfig
from dice_py.errors import UsageError
from dice_py.models.loading import load_model
from dice_py.training.schedule import warmup_steps

if TYPE_CHECKING:
    import torch

_KEPT = 0.5
"""With less of the update than this, the dtype "auto" is float32."""


class Update(NamedTuple):
    """An update Δ = trained − start of all weights, and Δ' = trained, rounded − start.

    Attributes:
        rms: root mean square of Δ over the weights.
        largest: largest |Δ|.
        kept: Δ'·Δ / Δ·Δ, the share of the update that is left after rounding; 1 if nothing is rounded.
    """

    rms: float
    largest: float
    kept: float


def measure_update(
    trained: Iterable[tuple[str, torch.Tensor]], start: Callable[[str], torch.Tensor], dtype: torch.dtype
) -> Update:
    """The update of weights in their training dtype, and what rounding to `dtype` leaves of it.

    Args:
        trained: names and values. Values that are not floating-point numbers are left out.
        start: the value of a name before training.
    """
    import torch

    squares = kept = largest = 0.0
    count = 0
    for name, value in trained:
        if not value.is_floating_point():
            continue
        before = start(name).to(device=value.device, dtype=torch.float32)
        change = value.detach().float() - before
        squares += float(change.square().sum(dtype=torch.float64))
        rounded = value.detach().to(dtype).float() - before
        kept += float((rounded * change).sum(dtype=torch.float64))
        largest = max(largest, float(change.abs().max())) if change.numel() else largest
        count += change.numel()
    return Update(math.sqrt(squares / max(1, count)), largest, kept / squares if squares else 1.0)


def start_weights(policy: Path, names: Iterable[str], models: ModelConfig) -> Callable[[str], torch.Tensor]:
    """The weights of a model folder by name: read one by one from its safetensors, else from the loaded model.

    The model is loaded where the files have other names than the module, or another format.
    """
    from safetensors import safe_open

    files: dict[str, Any] = {}
    for file in sorted(policy.glob("*.safetensors")):
        handle = safe_open(file, framework="pt")
        files |= dict.fromkeys(handle.keys(), handle)
    if all(name in files for name in names):
        return lambda name: files[name].get_tensor(name)
    on_cpu = models.model_copy(update={"dtype": "float32"})
    state = load_model(policy, on_cpu, training=True).state_dict()
    return lambda name: state[name]


def check_update(
    update: Update, config: TrainConfig, stored: torch.dtype, steps: int
) -> tuple[torch.dtype, str | None]:
    """The dtype to save the policy in, and a note if that is not plainly the stored one.

    Args:
        update: measured with the rounding to `stored`.
        stored: dtype of the start's files.
        steps: optimizer steps of the training.

    Raises:
        UsageError: the policy did not change, or would not in the dtype that train.save_dtype asks for.
    """
    import torch

    name = str(stored).removeprefix("torch.")
    settings = (
        f"train.learning_rate is {config.learning_rate:g}, and the training had {steps} step{'s' * (steps != 1)}, "
        f"of which train.warmup_steps={config.warmup_steps} took {min(warmup_steps(config, steps), steps)}"
    )
    if not update.largest:
        raise UsageError(
            f"the training changed no weight of the policy, so the round would end where it began: {settings}. Raise "
            "the learning rate, lower train.warmup_steps, or train on more pairs"
        )
    if config.save_dtype == "float32":
        return torch.float32, None
    lost = f"rounding to {name}, the dtype of the start, leaves {max(0.0, update.kept):.0%} of the update"
    if config.save_dtype == "auto":
        if update.kept >= _KEPT:
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
    return stored, f"warning: {lost}; train.save_dtype=float32 keeps it" if update.kept < _KEPT else None
