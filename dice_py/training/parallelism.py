"""How one training is spread over processes: how many, by which strategy, and the files that tell accelerate.

    none    one process, that of the stage
    ddp     every process holds the whole model; for adapters (train.lora), and on the CPU
    fsdp2   torch's fully_shard: weights, gradients and optimizer states are split over the processes
    zero3   the same by DeepSpeed, which must be installed
    own     what the user's accelerate file says (train.accelerate_config)

The files are written into the stage's folder, so that what was used can be read there, copied, changed and given back
as train.accelerate_config. Mixed precision is not in them: model.dtype decides it, for every strategy alike.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from dice_py.compute.devices import find_groups
from dice_py.config.shared import DevicesConfig, ModelConfig
from dice_py.config.training import TrainConfig
from dice_py.errors import UsageError
from dice_py.events import Report, no_report
from dice_py.storage.files import write_json, write_text
from dice_py.storage.keys import file_digest

ACCELERATE, ZERO3 = "accelerate.yaml", "zero3.json"

_HEADER = """\
# What `accelerate launch` was given for this training. To train in another way, copy this file, change it and set
# train.accelerate_config to the copy. Mixed precision comes from model.dtype.
"""


@dataclass(frozen=True)
class ProcessLayout:
    """Where a training runs."""

    processes: int = 1
    strategy: Literal["none", "ddp", "fsdp2", "zero3", "own"] = "none"
    device: Literal["cpu", "cuda"] = "cpu"
    gpus: tuple[str, ...] = ()
    """As CUDA_VISIBLE_DEVICES names them; empty: those that are visible."""
    own: Path | None = None
    """The user's accelerate file."""

    @property
    def checkpoints(self) -> str:
        """A name that only layouts which can go on from each other's checkpoints share.

        A checkpoint of one process is that of ddp. Others are in shards: one for each process.
        """
        if self.own is not None:
            return f"own {file_digest(self.own)}"
        return "whole" if self.strategy in ("none", "ddp") else f"{self.strategy} of {self.processes}"


def lay_out(
    config: TrainConfig, models: ModelConfig, devices: DevicesConfig | None, report: Report = no_report
) -> ProcessLayout:
    """Resolves `auto`, and checks what this machine can do; no CUDA context is made.

    Args:
        devices: none: `processes: auto` means one process, on the first visible GPU.
        report: hears a note of GPUs that stay idle.

    Raises:
        UsageError: more processes than GPUs, a strategy that needs what is not here, a batch that does not divide.
    """
    started = os.environ.get("WORLD_SIZE", "1")
    if started != "1":
        raise UsageError(
            f"the environment says WORLD_SIZE={started}, as under torchrun or accelerate launch; training starts its "
            "processes itself: run dice alone, unset WORLD_SIZE, and set train.processes or train.accelerate_config"
        )
    groups = find_groups(devices or DevicesConfig(), models)
    gpus = tuple(gpu for group in groups for gpu in group.gpus)
    if config.accelerate_config is not None:
        return _own_layout(config, Path(config.accelerate_config).expanduser(), gpus)
    processes = _processes(config, gpus, devices is not None, report)
    device: Literal["cpu", "cuda"] = "cuda" if gpus else "cpu"
    if processes == 1:
        if config.strategy in ("fsdp2", "zero3"):
            report("note", text=f"training is one process, which has nothing to shard ({config.strategy}) with")
        # Without devices, and with the first GPU, nothing needs to be hidden.
        return ProcessLayout(device=device, gpus=gpus[:1] if devices is not None else ())
    strategy = config.strategy
    if strategy == "auto":
        strategy = "fsdp2" if gpus and config.lora is None else "ddp"
    if strategy != "ddp" and not gpus:
        raise UsageError(f"train.strategy is {strategy}, which needs GPUs; on the CPU take ddp, or leave it at auto")
    if strategy == "zero3" and importlib.util.find_spec("deepspeed") is None:
        raise UsageError("train.strategy is zero3, but DeepSpeed is not installed; add it with: pip install deepspeed")
    return ProcessLayout(processes, strategy, device, gpus[:processes])


def _processes(config: TrainConfig, gpus: tuple[str, ...], several: bool, report: Report) -> int:
    if config.processes != "auto":
        if gpus and config.processes > len(gpus):
            raise UsageError(
                f"train.processes is {config.processes}, but training has {len(gpus)} GPU(s) to use (devices.gpus, "
                "model.device and CUDA_VISIBLE_DEVICES decide which); lower it, or set it to auto"
            )
        return config.processes
    if not several or not gpus:
        return 1
    micro = config.batch_size // config.per_device_train_batch_size
    processes = max(count for count in range(1, len(gpus) + 1) if micro % count == 0)
    if processes < len(gpus):
        report(
            "note",
            text=f"training takes {processes} of {len(gpus)} GPUs: train.batch_size ({config.batch_size}) must be a "
            f"multiple of train.per_device_train_batch_size ({config.per_device_train_batch_size}) × processes",
        )
    return processes


def _own_layout(config: TrainConfig, file: Path, gpus: tuple[str, ...]) -> ProcessLayout:
    where = f"train.accelerate_config: {file}"
    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{where}: {error.strerror}; give a file that `accelerate config` wrote") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{where} is not YAML: {error}") from None
    processes = given.get("num_processes") if isinstance(given, dict) else None
    if not isinstance(processes, int) or isinstance(processes, bool) or processes < 1:
        raise UsageError(f"{where} has no num_processes; give a file that `accelerate config` wrote")
    if given.get("num_machines", 1) != 1:
        raise UsageError(f"{where} is for several machines; training runs on one")
    if gpus and processes > len(gpus):
        raise UsageError(f"{where} is for {processes} processes, but training has {len(gpus)} GPU(s) to use")
    if config.batch_size % (config.per_device_train_batch_size * processes):
        raise UsageError(
            f"train.batch_size ({config.batch_size}) must be a multiple of train.per_device_train_batch_size × "
            f"num_processes of {file} ({config.per_device_train_batch_size} × {processes})"
        )
    return ProcessLayout(processes, "own", "cuda" if gpus else "cpu", gpus, own=file.resolve())


def accelerate_config(layout: ProcessLayout, config: TrainConfig, zero3: Path | None = None) -> dict[str, Any]:
    """accelerate's config file for a layout of several processes, as a mapping.

    Args:
        zero3: where `zero3_config` is written.
    """
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}
    found: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        # On the CPU too: for MULTI_CPU accelerate starts one process, or asks for MPI.
        "distributed_type": kinds[layout.strategy],
        "num_machines": 1,
        "num_processes": layout.processes,
        "machine_rank": 0,
        "main_process_port": 0,  # any that is free
        "use_cpu": layout.device == "cpu",
    }
    if layout.strategy == "fsdp2":
        found["fsdp_config"] = {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_reshard_after_forward": True,
            "fsdp_offload_params": False,
            # Of the checkpoints; the trained model is gathered whole.
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",
            # The first process alone reads the weights, and deals them.
            "fsdp_cpu_ram_efficient_loading": True,
            "fsdp_activation_checkpointing": config.gradient_checkpointing,
        }
    if layout.strategy == "zero3":
        found["deepspeed_config"] = {
            "deepspeed_config_file": str(zero3),
            "zero3_init_flag": True,  # weights are split while they are read
        }
    return found


def zero3_config() -> dict[str, Any]:
    """DeepSpeed's config for `zero3`; transformers fills in `auto` from the training's own settings."""
    return {
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    }


def write_accelerate_config(layout: ProcessLayout, config: TrainConfig, folder: Path) -> Path:
    """The file for `accelerate launch --config_file`, written into `folder`, or the user's own."""
    if layout.own is not None:
        return layout.own
    folder.mkdir(parents=True, exist_ok=True)
    zero3 = (folder / ZERO3).resolve()
    if layout.strategy == "zero3":
        write_json(zero3, zero3_config())
    made = accelerate_config(layout, config, zero3)
    write_text(folder / ACCELERATE, _HEADER + yaml.safe_dump(made, sort_keys=False))
    return folder / ACCELERATE
