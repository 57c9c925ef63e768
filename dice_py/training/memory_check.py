"""Whether training can fit into the memory of its devices: known before a run, which would find out after sampling."""

from __future__ import annotations

from pathlib import Path

from dice_py.compute.devices import free_gpu_memory
from dice_py.compute.memory import free_host_memory, resident_memory
from dice_py.config.shared import DevicesConfig, ModelConfig
from dice_py.config.training import TrainConfig
from dice_py.errors import OutOfMemoryError
from dice_py.models.loading import placement
from dice_py.models.memory import TrainingMemory, host_memory, shortage_text
from dice_py.models.sizes import model_size
from dice_py.training.parallelism import lay_out


def check_training_memory(
    train: TrainConfig, models: ModelConfig, devices: DevicesConfig, policy: Path, *, prompt: int, response: int
) -> None:
    """Compares what training needs at least (models/memory.py) with the memory that is free now.

    It says nothing of an adapter, whose base model is elsewhere, and of a layout in the user's accelerate file.

    Args:
        policy: the model's folder.
        prompt, response: tokens of the longest ones, as far as they are known. Where they are short, the check is of
            weights, gradients and optimizer states.

    Raises:
        OutOfMemoryError: training does not fit.
        UsageError: as of `lay_out`.
    """
    layout, size = lay_out(train, models, devices), model_size(policy)
    if not size.layers or layout.strategy == "own":
        return
    cuda = layout.device == "cuda"
    needs = TrainingMemory(
        size, train, placement(models).dtype, prompt, response, layout.processes, layout.shards, cuda
    )
    needed, available, memory = needs.least(), free_host_memory(), "memory"
    if cuda:
        available, memory = free_gpu_memory(layout.gpus), "GPU memory"
    else:
        needed = host_memory(needed, resident_memory("VmRSS"), layout.processes // layout.nodes)
    if needed > available:
        how = "adapters" if train.lora else "gradients and optimizer states"
        raise OutOfMemoryError(
            f"{shortage_text('train', needed, available, memory)} ({size.parameters / 1e9:.2f} billion parameters, "
            f"with {how}); {needs.remedy(available)}. `--force` (of dice run and dice resume) tries it all the same"
        )
