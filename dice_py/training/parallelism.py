"""How one training is distributed over processes: their number, the strategy, and the config files for accelerate.

    none    one process, that of the stage
    ddp     every process holds the complete model; for adapters (train.lora), and on the CPU
    fsdp2   torch's fully_shard: weights, gradients and optimizer states are sharded over the processes
    zero3   the same with DeepSpeed, which must be installed
    own     as in the user's accelerate file (train.accelerate_config)

Over several nodes (train.nodes) it is ddp or fsdp2, with as many processes on each. Ray Train starts them with
devices.executor=ray (training/ray_launcher.py), else srun and torchrun in an allocation of Slurm (training/slurm.py).

The files are written into the stage's folder. A user can read there what was used, or copy a file, change it, and set
train.accelerate_config to the copy. The files do not set mixed precision: model.dtype does, for every strategy.
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
from dice_py.config.yaml_text import read_yaml
from dice_py.errors import UsageError
from dice_py.events import Report, no_report
from dice_py.storage.files import write_json, write_text
from dice_py.storage.keys import file_digest
from dice_py.training.nodes import gpus_per_node, slurm_gpus

ACCELERATE, ZERO3 = "accelerate.yaml", "zero3.json"
SHARDED = ("FSDP", "DEEPSPEED")
"""accelerate's names for the strategies in which no process holds the complete model."""

_HEADER = """\
# The config of `accelerate launch` for this training. To train differently, copy this file, change the copy, and set
# train.accelerate_config to it. Mixed precision comes from model.dtype.
"""


@dataclass(frozen=True)
class ProcessLayout:
    """The processes of a training and their devices."""

    processes: int = 1
    strategy: Literal["none", "ddp", "fsdp2", "zero3", "own"] = "none"
    device: Literal["cpu", "cuda"] = "cpu"
    gpus: tuple[str, ...] = ()
    """Names for CUDA_VISIBLE_DEVICES; empty to leave the variable as it is."""
    own: Path | None = None
    """The user's accelerate file."""
    nodes: int = 1
    by: Literal["accelerate", "slurm", "ray"] = "accelerate"
    """What starts the processes, if there are several."""

    @property
    def shards(self) -> int:
        """Processes that share weights, gradients and optimizer states; 1 if each has its own."""
        return self.processes if self.strategy in ("fsdp2", "zero3") else 1

    @property
    def checkpoints(self) -> str:
        """The layout of a checkpoint's files. Layouts with the same value can resume from each other's checkpoints.

        One process and ddp write the same files. The other strategies write one shard for each process.
        """
        if self.own is not None:
            return f"own {file_digest(self.own)}"
        return "whole" if self.strategy in ("none", "ddp") else f"{self.strategy} of {self.processes}"


def lay_out(
    config: TrainConfig, models: ModelConfig, devices: DevicesConfig | None, report: Report = no_report
) -> ProcessLayout:
    """Resolves `auto` in `train.processes` and `train.strategy`, without creating a CUDA context.

    Args:
        devices: the GPUs to use. Without it, `processes: auto` is one process on the first visible GPU.
        report: receives a note if GPUs stay idle.

    Raises:
        UsageError: more processes than GPUs, a strategy without its hardware or package, or a batch size that the
            processes cannot divide.
    """
    started = os.environ.get("WORLD_SIZE", "1")
    if started != "1":
        raise UsageError(
            f"the environment has WORLD_SIZE={started}, as under torchrun or accelerate launch, but training starts "
            "its own processes; run dice without a launcher, unset WORLD_SIZE, and set train.processes or "
            "train.accelerate_config"
        )
    groups = find_groups(devices or DevicesConfig(), models)
    gpus = tuple(gpu for group in groups for gpu in group.gpus)
    if config.nodes > 1:
        return _over_nodes(config, devices or DevicesConfig(), gpus, report)
    if config.accelerate_config is not None:
        return _own_layout(config, Path(config.accelerate_config).expanduser(), gpus)
    processes = _processes(config, gpus, devices is not None, report)
    device: Literal["cpu", "cuda"] = "cuda" if gpus else "cpu"
    if processes == 1:
        if config.strategy in ("fsdp2", "zero3"):
            report(
                "note", text=f"training runs in one process, so train.strategy={config.strategy} has nothing to shard"
            )
        # Without `devices`, the process uses the first visible GPU, and no GPU needs to be hidden.
        return ProcessLayout(device=device, gpus=gpus[:1] if devices is not None else ())
    strategy = config.strategy
    if strategy == "auto":
        strategy = "fsdp2" if gpus and config.lora is None else "ddp"
    if strategy != "ddp" and not gpus:
        raise UsageError(f"train.strategy is {strategy}, which needs GPUs; on the CPU, set it to ddp or auto")
    if strategy == "zero3" and importlib.util.find_spec("deepspeed") is None:
        raise UsageError("train.strategy is zero3, but DeepSpeed is not installed; add it with: pip install deepspeed")
    return ProcessLayout(processes, strategy, device, gpus[:processes])


def even_share(config: TrainConfig, nodes: int, most: int) -> int:
    """Processes on each of so many nodes, at most `most`, among which the batch can be split; `processes: auto`.

    Raises:
        UsageError: there are more nodes than the batch has parts.
    """
    micro_batches = config.batch_size // config.per_device_train_batch_size
    each = max((count for count in range(1, most + 1) if micro_batches % (count * nodes) == 0), default=0)
    if not each:
        raise UsageError(
            f"train.batch_size ({config.batch_size}) must be a multiple of train.per_device_train_batch_size × "
            f"processes, of which train.nodes={nodes} has one at least on each node"
        )
    return each


def _over_nodes(config: TrainConfig, devices: DevicesConfig, gpus: tuple[str, ...], report: Report) -> ProcessLayout:
    """The layout over several nodes, each with as many processes, and GPUs, as any other.

    Args:
        gpus: of this node.
    """
    by: Literal["slurm", "ray"] = "ray" if devices.executor == "ray" else "slurm"
    per_node = gpus_per_node(devices, config.nodes, cuda=bool(gpus)) if by == "ray" else slurm_gpus(config.nodes, gpus)
    if config.processes == "auto":
        each = even_share(config, config.nodes, per_node)
        if each < per_node:
            report(
                "note",
                text=f"training uses {each} of {per_node} GPUs of each node: train.batch_size has no more shares",
            )
    else:
        each, rest = divmod(config.processes, config.nodes)
        if rest or (gpus and each > per_node):
            raise UsageError(
                f"train.processes is {config.processes}, which {config.nodes} nodes (train.nodes) with {per_node} "
                "GPU(s) each cannot share evenly; set it to auto, or to a multiple of train.nodes"
            )
    strategy = config.strategy if config.strategy != "auto" else "fsdp2" if gpus and config.lora is None else "ddp"
    if strategy == "zero3":
        raise UsageError("train.strategy is zero3, which runs on one node here; over several, set it to fsdp2")
    if strategy == "fsdp2" and not gpus:
        raise UsageError("train.strategy is fsdp2, which needs GPUs; on the CPU, set it to ddp or auto")
    return ProcessLayout(
        each * config.nodes, strategy, "cuda" if gpus else "cpu", gpus[:each], nodes=config.nodes, by=by
    )


def _processes(config: TrainConfig, gpus: tuple[str, ...], all_gpus: bool, report: Report) -> int:
    """The number of processes; `all_gpus`: "auto" is as many as the GPUs and the batch size allow."""
    if config.processes != "auto":
        if gpus and config.processes > len(gpus):
            raise UsageError(
                f"train.processes is {config.processes}, but training can use {len(gpus)} GPU(s) (devices.gpus, "
                "model.device and CUDA_VISIBLE_DEVICES select them); lower it, or set it to auto"
            )
        return config.processes
    if not all_gpus or not gpus:
        return 1
    micro_batches = config.batch_size // config.per_device_train_batch_size
    processes = max(count for count in range(1, len(gpus) + 1) if micro_batches % count == 0)
    if processes < len(gpus):
        report(
            "note",
            text=f"training uses {processes} of {len(gpus)} GPUs: train.batch_size ({config.batch_size}) must be a "
            f"multiple of train.per_device_train_batch_size ({config.per_device_train_batch_size}) × processes",
        )
    return processes


def _own_layout(config: TrainConfig, file: Path, gpus: tuple[str, ...]) -> ProcessLayout:
    """The layout in the user's accelerate file."""
    where = f"train.accelerate_config: {file}"
    try:
        content = read_yaml(file)
    except UsageError as error:
        raise UsageError(f"{where}: {error}; set it to a file that `accelerate config` wrote") from None
    processes = content.get("num_processes")
    if not isinstance(processes, int) or isinstance(processes, bool) or processes < 1:
        raise UsageError(f"{where} has no num_processes; use a file that `accelerate config` wrote")
    if content.get("num_machines", 1) != 1:
        raise UsageError(f"{where} is for several machines, but training runs on one; set its num_machines to 1")
    if gpus and processes > len(gpus):
        raise UsageError(
            f"{where} is for {processes} processes, but training can use {len(gpus)} GPU(s); lower its num_processes"
        )
    if config.batch_size % (config.per_device_train_batch_size * processes):
        raise UsageError(
            f"train.batch_size ({config.batch_size}) must be a multiple of train.per_device_train_batch_size × "
            f"num_processes of {file} ({config.per_device_train_batch_size} × {processes})"
        )
    return ProcessLayout(processes, "own", "cuda" if gpus else "cpu", gpus, own=file.resolve())


def accelerate_config(layout: ProcessLayout, config: TrainConfig, zero3: Path | None = None) -> dict[str, Any]:
    """The content of accelerate's config file for a layout of several processes.

    Args:
        zero3: path of the file with `zero3_config`, for the strategy zero3.
    """
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}
    content: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        # MULTI_GPU on the CPU too: for MULTI_CPU, accelerate starts one process or needs MPI.
        "distributed_type": kinds[layout.strategy],
        "num_machines": 1,
        "num_processes": layout.processes,
        "machine_rank": 0,
        "main_process_port": 0,  # any free port
        "use_cpu": layout.device == "cpu",
    }
    if layout.strategy == "fsdp2":
        content["fsdp_config"] = {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_reshard_after_forward": True,
            "fsdp_offload_params": False,
            # For checkpoints. The trained model is gathered.
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",
            # The first process reads the weights, and distributes them.
            "fsdp_cpu_ram_efficient_loading": True,
            "fsdp_activation_checkpointing": config.gradient_checkpointing,
        }
    if layout.strategy == "zero3":
        content["deepspeed_config"] = {
            "deepspeed_config_file": str(zero3),
            "zero3_init_flag": True,  # Weights are sharded while they are read.
        }
    return content


def zero3_config() -> dict[str, Any]:
    """DeepSpeed's config for the strategy zero3. transformers replaces "auto" with the values of the training."""
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
    """Writes the files for `accelerate launch` into `folder`, which is created.

    Returns:
        The path for `--config_file`: the file that was written, or the user's own.
    """
    if layout.own is not None:
        return layout.own
    folder.mkdir(parents=True, exist_ok=True)
    zero3 = (folder / ZERO3).resolve()
    if layout.strategy == "zero3":
        write_json(zero3, zero3_config())
    content = accelerate_config(layout, config, zero3)
    write_text(folder / ACCELERATE, _HEADER + yaml.safe_dump(content, sort_keys=False))
    return folder / ACCELERATE


def accelerate_environment(file: Path) -> dict[str, str]:
    """The environment variables that `accelerate launch` would set for the ranks of a config file of this project.

    For launchers other than accelerate's, which set the rank and the number of processes themselves.
    """
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    parsed = launch_command_parser().parse_args(["--config_file", str(file), "--module", "dice_py.training.launcher"])
    arguments, *_ = _validate_launch_command(parsed)
    environment: dict[str, str] = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in environment.items() if os.environ.get(name) != value}
