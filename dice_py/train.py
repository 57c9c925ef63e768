"""Stage 5, train: one DPO run from π_t with π_t itself as the reference.

Loss: −log σ(β·[(log π(y_w|x) − ref_w) − (log π(y_l|x) − ref_l)]) (Rafailov et al., arXiv 2305.18290, eq. 7),
plus, if asked, sft_weight × the mean NLL of the chosen tokens. At step 0 the policy is the reference and the
DPO term is ln 2; a run in which it is not stops, since tokens, masks, templates or types then differ between
scorer and trainer.

Training is the work of one or several processes, each of which runs `dice_py.train_rank.train_rank`: this one where
there is one, others that this one starts (dice_py/train_launch.py) where dice_py/train_layout.py says so.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.artefacts import Report, no_report, read_json, read_parquet
from dice_py.config import DevicesConfig, ModelConfig, TrainConfig
from dice_py.errors import DataError
from dice_py.groups import Group, device_in_group, only_these_gpus
from dice_py.models import require
from dice_py.train_launch import launch
from dice_py.train_layout import Layout, lay_out, write_accelerate_config

STAMP = "dice.json"
"""The file of a whole model, or a whole checkpoint, that says what made it."""
COLUMNS = ["prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps"]
"""What training reads of a training set."""


def is_trained(folder: Path, key: str) -> bool:
    """True when `folder` holds the whole model that `train` makes for `key`."""
    stamp = folder / STAMP
    return stamp.is_file() and read_json(stamp).get("key") == key


def load_training_set(path: Path, max_length: int | None) -> tuple[pl.DataFrame, int]:
    """The columns that training needs, and how many pairs were left out as longer than `max_length` tokens.

    Raises:
        DataError: a column is missing or holds no token ids, no pair is left, or a reference log-probability is
            null or not finite.
    """
    frame = read_parquet(path, COLUMNS)
    for column, dtype in frame.schema.items():
        if column.endswith("_ids") and not (isinstance(dtype, pl.List) and dtype.inner.is_integer()):
            raise DataError(
                f"{path}: column {column!r} is {dtype}, not a list of token ids; text is never tokenised here"
            )
    finite = pl.col("ref_chosen_logps").is_finite() & pl.col("ref_rejected_logps").is_finite()
    bad = frame.filter(~finite.fill_null(False))
    if bad.height:
        raise DataError(f"{path}: {bad.height} pairs have a reference log-probability that is not finite")
    kept = frame
    if max_length is not None:
        longer = pl.max_horizontal(pl.col("chosen_ids").list.len(), pl.col("rejected_ids").list.len())
        kept = frame.filter(pl.col("prompt_ids").list.len() + longer <= max_length)
    if kept.is_empty():
        raise DataError(f"{path}: none of its {frame.height} pairs can be trained on; is train.max_length too small?")
    return kept, frame.height - kept.height


def _last_checkpoint(folder: Path, stamp: dict[str, Any]) -> Path | None:
    """The latest whole checkpoint of this very training in a like layout; any other checkpoints are removed."""
    whole: list[tuple[int, Path]] = []
    for checkpoint in folder.glob("checkpoint-*"):
        if (checkpoint / STAMP).is_file() and read_json(checkpoint / STAMP) == stamp:
            whole.append((int(checkpoint.name.rsplit("-", 1)[1]), checkpoint))
        else:
            shutil.rmtree(checkpoint)
    return max(whole)[1] if whole else None


def checkpoint_stamp(key: str, layout: Layout) -> dict[str, Any]:
    """What the stamp of a checkpoint says: which training it is of, and how it is laid out."""
    return {"key": key, "layout": layout.checkpoints}


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
            `ref_rejected_logps` (dice_py.artefacts.TRAINING_SET).
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
    checkpoint = _last_checkpoint(checkpoints, checkpoint_stamp(key, layout)) if checkpoints.exists() else None
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
        from dice_py.train_rank import train_rank

        with only_these_gpus(Group(1, layout.gpus)) if layout.gpus else contextlib.nullcontext():
            counts = train_rank(**arguments, report=report)
    else:
        counts = _launched(layout, config, out, arguments, report)
        if not is_trained(target, key):
            raise RuntimeError(f"every process of the training ended well, but {target} is not whole")
    shutil.rmtree(checkpoints, ignore_errors=True)
    return counts


def _launched(
    layout: Layout, config: TrainConfig, out: Path, arguments: dict[str, Any], report: Report
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
        [*command, "dice_py.train_launch"],
        layout.processes,
        "dice_py.train_rank:train_rank",
        arguments,
        environment=environment,
        report=report,
    )
    return counts
