"""Stage 5, train: one DPO run from π_t with π_t itself as the reference.

Loss: −log σ(β·[(log π(y_w|x) − ref_w) − (log π(y_l|x) − ref_l)]) (Rafailov et al., arXiv 2305.18290, eq. 7),
plus, if asked, sft_weight × the mean NLL of the chosen tokens. At step 0 the policy is the reference and the
DPO term is ln 2; a run in which it is not stops, since tokens, masks, templates or types then differ between
scorer and trainer.

Training is the work of one or several processes, each of which runs `train_rank`: this one where
there is one, others that this one starts (training/launcher.py) where training/parallelism.py says so.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from dice_py.compute.devices import Group, device_in_group, only_these_gpus
from dice_py.config.shared import DevicesConfig, ModelConfig
from dice_py.config.training import TrainConfig
from dice_py.events import Report, no_report
from dice_py.models.loading import require
from dice_py.storage.files import read_json
from dice_py.training.checkpoints import STAMP, checkpoint_stamp, is_trained, last_checkpoint
from dice_py.training.dataset import load_training_set
from dice_py.training.launcher import launch
from dice_py.training.parallelism import ProcessLayout, lay_out, write_accelerate_config


def train(
    config: TrainConfig,
    models: ModelConfig,
    *,
    policy: Path,
    training_set: Path,
    out: Path,
    beta: float,
    seed: int,
    key: str,
    devices: DevicesConfig | None = None,
    report: Report = no_report,
) -> dict[str, Any]:
    """Trains from `policy` on `training_set`; the new policy is `out/model`, in the Hugging Face layout.

    Weights are held in float32 and computed with in the configured type: at the paper's learning rate of
    5e-7 an update vanishes in bfloat16's 8 bits. The model is saved in the type that `policy` is stored in
    (with zero3, by way of the computing type: what DeepSpeed gathers). With LoRA the adapters are merged before saving.

    Several processes (train.processes, train.strategy, train.accelerate_config) make the same steps as one: a step's
    pairs are the same, and only the order of sums differs. Where the pairs of an epoch do not divide among the
    processes, its last step is filled up with pairs of its start. What accelerate is told is in `out/accelerate.yaml`.

    Args:
        training_set: Parquet with `prompt_ids`, `chosen_ids`, `rejected_ids`, `ref_chosen_logps`,
            `ref_rejected_logps` (dice_py.storage.schemas.TRAINING_SET).
        key: of this training. A model under it is left as it is; its checkpoints are gone on from, where they are of
            a like layout.
        devices: GPUs to use; none: train.processes "auto" is one.

    Returns:
        Counts: `pairs`, `pairs_too_long`, `steps`, `step0_loss`, `step0_max_abs_difference`, `final_loss`.

    Raises:
        DataError: an unusable training set, or a loss at step 0 that is not ln 2.
        UsageError: a layout that this machine cannot have.
        OutOfMemoryError: on any rank.
    """
    target = out / "model"
    if is_trained(target, key):
        return dict(read_json(target / STAMP)["counts"])
    require("torch", "transformers", "trl", "accelerate", "datasets", extra="train")
    layout = lay_out(config, models, devices, report)
    load_training_set(training_set, config.max_length)  # what is wrong with it is known before processes start
    checkpoints = out / "checkpoints"
    checkpoint = last_checkpoint(checkpoints, checkpoint_stamp(key, layout)) if checkpoints.exists() else None
    if checkpoint is not None:
        report("note", text=f"training goes on from {checkpoint.name}")
    arguments: dict[str, Any] = {
        "config": config,
        "models": models if devices is None else device_in_group(models),
        "policy": policy,
        "training_set": training_set,
        "out": out,
        "beta": beta,
        "seed": seed,
        "key": key,
        "layout": layout,
        "checkpoint": checkpoint,
    }
    counts: dict[str, Any]
    if layout.strategy == "none":
        from dice_py.training.trainer import train_rank

        with only_these_gpus(Group(1, layout.gpus)) if layout.gpus else contextlib.nullcontext():
            counts = train_rank(**arguments, report=report)
    else:
        counts = _launched(layout, config, out, arguments, report)
        if not is_trained(target, key):
            raise RuntimeError(f"every process of the training ended well, but {target} is not whole")
    shutil.rmtree(checkpoints, ignore_errors=True)
    return counts


def _launched(
    layout: ProcessLayout, config: TrainConfig, out: Path, arguments: dict[str, Any], report: Report
) -> dict[str, Any]:
    """The training in processes of its own."""
    file = write_accelerate_config(layout, config, out)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), "--module"]
    environment = {}
    if layout.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(layout.gpus)
    if "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // layout.processes))
    report("note", text=f"training is {layout.processes} processes ({layout.strategy}), as {file} says")
    counts: dict[str, Any] = launch(
        [*command, "dice_py.training.launcher"],
        layout.processes,
        "dice_py.training.trainer:train_rank",
        arguments,
        environment=environment,
        report=report,
    )
    return counts
