"""A rank whose accelerate shards on the CPU, which it does not support (for MULTI_CPU it silently drops FSDP).

Replaces dice_py.training.launcher in tests. accelerate is patched to treat its gloo processes as GPU processes whose
device is the CPU. Everything else is as on GPUs: accelerate's FSDP2, torch's fully_shard, the trainer, the check at
step 0 and saving; and DeepSpeed's ZeRO-3, if it is installed.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import transformers.training_args
import trl
from accelerate.state import DistributedType, PartialState

from dice_py.training import ray_launcher
from dice_py.training import trainer as trainer_module
from dice_py.training.launcher import main
from dice_py.training.step0 import Step0


def shard_on_cpu() -> None:
    """Patches accelerate in this process."""
    zero = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"

    def prepare_backend(self: PartialState, *_: Any, **__: Any) -> tuple[str, DistributedType]:
        if not zero and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        return "gloo", DistributedType.MULTI_GPU

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = prepare_backend
    if zero:
        # accelerate starts DeepSpeed only if it does not use the CPU.
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ.pop("ACCELERATE_USE_CPU", None)
        original = trl.DPOConfig
        trl.DPOConfig = lambda **named: original(**{**named, "use_cpu": False})
        transformers.training_args.is_torch_bf16_gpu_available = lambda: True


def inspect_setup(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """Runs `train_rank` until step 0, and returns what it has set up by then."""
    counts = {"models_loaded": 0, "hashes": 0}
    setup: dict[str, Any] = {}

    def counting(module: Any, name: str, count: str) -> None:
        function = getattr(module, name)

        def counting_function(*positional: Any, **named: Any) -> Any:
            counts[count] += 1
            return function(*positional, **named)

        setattr(module, name, counting_function)

    counting(transformers.AutoModelForCausalLM, "from_pretrained", "models_loaded")
    counting(trl.trainer.dpo_trainer, "create_model_from_path", "models_loaded")
    counting(trl.trainer.dpo_trainer, "hash_module", "hashes")

    def measure_step0(trainer: Any, pairs: int) -> Step0:
        model = trainer.model_wrapped
        with torch.no_grad():
            logps = trainer.token_logps(model, trainer.inputs_of([trainer.train_dataset[0]]))
        policy = trainer.accelerator.state.fsdp_plugin.mixed_precision_policy
        layer = model.model.layers[0]  # Sharded again, after the forward.
        weight = layer.mlp.up_proj.weight
        setup.update(
            reference=trainer.ref_model,
            sharded=trainer.accelerator.is_fsdp2 and trainer.is_fsdp_enabled,
            log_probs=str(logps.dtype),
            parameters=sorted({str(value.dtype) for value in layer.parameters()}),
            computed_in=str(policy.param_dtype),
            reduced_in=str(policy.reduce_dtype),
            held_by_each=weight.to_local().numel() / weight.numel(),
        )
        raise InterruptedError

    trainer_module.measure_step0 = measure_step0
    try:
        trainer_module.train_rank(*args, **kwargs)
    except InterruptedError:
        return {**counts, **setup}
    raise AssertionError("step 0 was not reached")


def rank_of_ray(config: dict[str, Any]) -> None:
    """A worker of Ray Train that shards on the CPU."""
    shard_on_cpu()
    ray_launcher.rank_of_ray(config)


if __name__ == "__main__":
    shard_on_cpu()
    main()
