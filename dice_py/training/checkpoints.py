"""Checkpoints and trained models: saving a model, and the stamps that mark complete folders."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dice_py.config.shared import ModelConfig
from dice_py.config.training import TrainConfig
from dice_py.errors import DataError, DiceError
from dice_py.models.loading import placement
from dice_py.storage.files import atomic, read_json, write_json
from dice_py.training.parallelism import SHARDED, ProcessLayout
from dice_py.training.update import check_update, measure_update, start_weights

if TYPE_CHECKING:
    from dice_py.training.pair_trainer import PairTrainer

STAMP = "dice.json"
"""Written last into the folder of a model or checkpoint: marks it as complete, and has the key of the training."""

PACKING_FILE = "packing.json"
"""In a checkpoint and in a trained model: for each step, the pairs and tokens of the first rank's packed rows."""


def is_trained(folder: Path, key: str) -> bool:
    """True if `folder` has the complete model of the training with this key."""
    stamp = folder / STAMP
    return stamp.is_file() and read_json(stamp).get("key") == key


def last_checkpoint(folder: Path, stamp: dict[str, Any]) -> Path | None:
    """The latest complete checkpoint with exactly this stamp. All checkpoints with another stamp are deleted."""
    complete: list[tuple[int, Path]] = []
    for checkpoint in folder.glob("checkpoint-*"):
        if (checkpoint / STAMP).is_file() and read_json(checkpoint / STAMP) == stamp:
            complete.append((int(checkpoint.name.rsplit("-", 1)[1]), checkpoint))
        else:
            shutil.rmtree(checkpoint)
    return max(complete)[1] if complete else None


def checkpoint_stamp(key: str, layout: ProcessLayout) -> dict[str, Any]:
    """Contents of a checkpoint's stamp: the training it belongs to, and the layout of its files."""
    return {"key": key, "layout": layout.checkpoints}


def stored_dtype(policy: Path, models: ModelConfig) -> Any:
    """The torch dtype in a model folder's config; for an adapter, which has none, the dtype it is computed in."""
    import torch

    file = policy / "config.json"
    config = read_json(file) if file.is_file() else {}
    name = config.get("dtype") or config.get("torch_dtype")
    return getattr(torch, name if isinstance(name, str) else placement(models).dtype)


def save_model(
    trainer: PairTrainer,
    *,
    config: TrainConfig,
    models: ModelConfig,
    policy: Path,
    target: Path,
    stamp: dict[str, Any],
) -> None:
    """Saves the trained model and its tokenizer in the Hugging Face layout, in the dtype of training/update.py.

    Every rank must call this, since gathering weights is collective. The main process writes.

    Args:
        policy: the folder that training started from; its generation_config.json is copied.
        target: written atomically.
        stamp: its `counts` receive `saved_dtype`, and the figures of the update.

    Raises:
        DataError: on every rank, if a weight is not finite.
        UsageError: on every rank, if no weight changed.
    """
    import torch

    accelerator = trainer.accelerator
    gathered: dict[str, Any] | None = None
    if accelerator.distributed_type.value in SHARDED:
        # Collective. Only the main process receives the weights, in host memory.
        gathered = accelerator.get_state_dict(trainer.model_wrapped) or {}
    error: DiceError | None = None
    if accelerator.is_main_process:
        try:
            _save(trainer, gathered, config, models, policy, target, stamp)
        except DiceError as failure:
            error = failure
    failed = accelerator.gather(torch.tensor([error is not None], device=accelerator.device))
    if error is not None:
        raise error
    if bool(failed.any()):
        raise DataError("the main process could not save the trained policy, and says why")


def _save(
    trainer: PairTrainer,
    weights: dict[str, Any] | None,
    config: TrainConfig,
    models: ModelConfig,
    policy: Path,
    target: Path,
    stamp: dict[str, Any],
) -> None:
    import torch

    model = trainer.accelerator.unwrap_model(trainer.model)
    if weights is not None:
        for tied in model.all_tied_weights_keys:  # Gathered one by one, tied weights no longer share memory.
            weights.pop(tied, None)
        values = weights
    else:
        if config.lora is not None:
            if model.dtype != torch.float32:  # Merged in 16 bits, the update would be rounded away.
                model = model.to(device="cpu", dtype=torch.float32)
            model = model.merge_and_unload()
        values = dict(model.named_parameters())
    if not all(bool(value.isfinite().all()) for value in values.values()):
        raise DataError(
            "training ended with weights that are not finite; lower train.learning_rate, or set train.max_grad_norm"
        )
    stored = stored_dtype(policy, models)
    update = measure_update(values.items(), start_weights(policy, values, models), stored)
    dtype, note = check_update(update, config, stored, trainer.state.global_step)
    if note is not None:
        trainer.report("note", text=note)
    stamp["counts"] |= {"saved_dtype": str(dtype).removeprefix("torch."), "update_rms": update.rms}
    if weights is not None:
        weights = {
            name: value.to(dtype=dtype) if value.is_floating_point() else value for name, value in values.items()
        }
    else:
        model = model.to(dtype=dtype)
    with atomic(target) as temporary:
        model.save_pretrained(temporary, state_dict=weights)
        if weights is not None:  # The model's config has the dtype of the float32 master weights.
            model.config.dtype = dtype
            model.config.save_pretrained(temporary)
        trainer.processing_class.save_pretrained(temporary)
        if (policy / "generation_config.json").is_file():
            shutil.copy(policy / "generation_config.json", temporary)
        write_json(temporary / "train_log.json", trainer.state.log_history)
        write_json(temporary / PACKING_FILE, trainer.packing)
        write_json(temporary / STAMP, stamp)
