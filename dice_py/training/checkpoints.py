"""Checkpoints and trained models: saving a model, and the stamps that mark complete folders."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any, Protocol

from dice_py.config.shared import ModelConfig
from dice_py.config.training import TrainConfig
from dice_py.errors import DataError, DiceError
from dice_py.events import Report
from dice_py.models.adapter_sum import merge
from dice_py.models.identity import model_identity
from dice_py.models.loading import placement
from dice_py.models.rounding import measure_change
from dice_py.models.saving import share_weights
from dice_py.storage.files import atomic, read_json, read_sealed, write_json
from dice_py.storage.integrity import MODEL_STAMP, damaged_in, read_stamp, set_aside, write_stamp
from dice_py.training.lora import adapter_weights, save_adapter
from dice_py.training.parallelism import SHARDED, ProcessLayout
from dice_py.training.update import check_update, start_weights


class SavableTrainer(Protocol):
    """What is saved of a trainer of TRL's, and who is told of it."""

    accelerator: Any
    model: Any
    model_wrapped: Any
    state: Any
    processing_class: Any
    report: Report
    packing: list[Any]


ADAPTER = "adapter"
"""The folder of the adapter that was merged into the trained model, beside it."""

PACKING_FILE = "packing.json"
"""In a checkpoint and in a trained model: for each step, the pairs and tokens of the first rank's packed rows."""


STEP0_FILE = "step0.json"
"""The measurement at step 0, beside the checkpoints, for a training that resumes from one."""


def is_trained(folder: Path, key: str) -> bool:
    """True if `folder` has the complete model of the training with this key, every file as it was written.

    It reads all files.
    """
    stamp = read_stamp(folder)
    return stamp is not None and stamp.get("key") == key and not damaged_in(folder)


def keep_model(folder: Path, key: str, report: Report) -> bool:
    """`is_trained`; a model with damaged files is set aside, and a note names the first of them."""
    if not folder.exists():
        return False
    damaged = damaged_in(folder)
    if damaged:
        what = "is missing" if not damaged[0].exists() else "is damaged: not as it was written"
        set_aside(folder, report, f"cannot be used: {damaged[0].name} {what}")
        return False
    stamp = read_stamp(folder)
    return stamp is not None and stamp.get("key") == key


def last_checkpoint(folder: Path, stamp: dict[str, Any], report: Report) -> Path | None:
    """The latest complete checkpoint with exactly this stamp, every file as it was written.

    All others are deleted, those with damaged files with a note. A checkpoint also needs the measurement at step 0.
    """
    complete: list[tuple[int, Path]] = []
    has_step0 = read_sealed(folder / STEP0_FILE, stamp["key"]) is not None
    for checkpoint in sorted(folder.glob("checkpoint-*")):
        stored = read_stamp(checkpoint)
        belongs = stored is not None and {name: value for name, value in stored.items() if name != "files"} == stamp
        damaged = damaged_in(checkpoint) if belongs or stored is None else []
        if belongs and not damaged and has_step0:
            complete.append((int(checkpoint.name.rsplit("-", 1)[1]), checkpoint))
            continue
        # Without a stamp, a kill has interrupted the save, which is no damage.
        if damaged and (stored is not None or (checkpoint / MODEL_STAMP).exists()):
            what = "is missing" if not damaged[0].exists() else "is damaged: not as it was written"
            report("note", text=f"{checkpoint} is not used and deleted: {damaged[0].name} {what}")
        shutil.rmtree(checkpoint)
    if not has_step0:
        with contextlib.suppress(FileNotFoundError):
            (folder / STEP0_FILE).unlink()
    return max(complete)[1] if complete else None


def resume_from(out: Path, key: str, layout: ProcessLayout, report: Report) -> Path | None:
    """The checkpoint in a stage's folder that its training resumes from, with a note; None: it begins anew."""
    folder = out / "checkpoints"
    checkpoint = last_checkpoint(folder, checkpoint_stamp(key, layout), report) if folder.exists() else None
    if checkpoint is not None:
        report("note", text=f"training resumes from {checkpoint.name}")
    return checkpoint


def stamp_checkpoint(checkpoint: Path, stamp: dict[str, Any]) -> None:
    """Marks a checkpoint as complete, after all of its files have reached the disk."""
    write_stamp(checkpoint, stamp)


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
    trainer: SavableTrainer,
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
        stamp: its `counts` receive `saved_dtype`, and the figures of the update; `start`, the identity of `policy`.

    Raises:
        DataError: on every rank, if a weight is not finite.
        UsageError: on every rank, if no weight changed.
    """
    from accelerate.utils import broadcast_object_list

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
    if accelerator.num_processes > 1:
        errors = [error]
        broadcast_object_list(errors)
        error = errors[0]
    if error is not None:
        raise error


def _save(
    trainer: SavableTrainer,
    weights: dict[str, Any] | None,
    config: TrainConfig,
    models: ModelConfig,
    policy: Path,
    target: Path,
    stamp: dict[str, Any],
) -> None:
    import torch

    model = trainer.accelerator.unwrap_model(trainer.model)
    adapter: tuple[Any, dict[str, Any]] | None = None
    if weights is not None:
        for tied in model.all_tied_weights_keys:  # Gathered one by one, tied weights no longer share memory.
            weights.pop(tied, None)
        values = weights
    else:
        if config.lora is not None:
            adapter = model.peft_config["default"], adapter_weights(model)
            if any(value.dtype != torch.float32 for value in model.parameters()):
                # Merged in 16 bits, the update would be rounded away.
                model = model.to(device="cpu", dtype=torch.float32)
            model = merge(model)
        values = dict(model.named_parameters())
    if not all(bool(value.isfinite().all()) for value in values.values()):
        raise DataError(
            "training ended with weights that are not finite; lower train.learning_rate, or set train.max_grad_norm"
        )
    stored = stored_dtype(policy, models)
    start = start_weights(policy, values, models)
    update = measure_change(((start(name), value) for name, value in values.items()), stored)
    dtype, note = check_update(update, config, stored, trainer.state.global_step)
    if note is not None:
        trainer.report("note", text=note)
    stamp["counts"] |= {"saved_dtype": str(dtype).removeprefix("torch."), "update_rms": update.rms}
    stamp["start"] = model_identity(policy)
    if weights is not None:
        weights = {
            name: value.to(dtype=dtype) if value.is_floating_point() else value for name, value in values.items()
        }
    else:
        model = model.to(dtype=dtype)
    # Before the model, whose stamp says that the training is complete.
    _keep_adapter(target.with_name(ADAPTER), adapter, policy, stamp, trainer.report)
    with atomic(target) as temporary:
        model.save_pretrained(temporary, state_dict=weights)
        if weights is not None:  # The model's config has the dtype of the float32 master weights.
            model.config.dtype = dtype
            model.config.save_pretrained(temporary)
        trainer.processing_class.save_pretrained(temporary)
        share_weights(temporary)
        if (policy / "generation_config.json").is_file():
            shutil.copy(policy / "generation_config.json", temporary)
        write_json(temporary / "train_log.json", trainer.state.log_history)
        write_json(temporary / PACKING_FILE, trainer.packing)
        write_stamp(temporary, stamp)


def _keep_adapter(
    folder: Path, adapter: tuple[Any, dict[str, Any]] | None, policy: Path, stamp: dict[str, Any], report: Report
) -> None:
    """Saves the adapter (PEFT's config and weights). Without one, that of an earlier training here is removed."""
    if adapter is not None:
        made = {"key": stamp["key"], "start": stamp["start"]}
        save_adapter(folder, *adapter, base=policy.resolve(), stamp=made, report=report)
    elif read_stamp(folder) is not None:
        shutil.rmtree(folder)
