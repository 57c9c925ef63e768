"""A rank whose accelerate shards on the CPU, which it refuses (for MULTI_CPU it drops FSDP without a word).

Stands in for dice_py.training.launcher in tests: accelerate is told that its processes on gloo are GPUs', whose device
is the CPU. All else is what runs on GPUs: accelerate's FSDP2, torch's fully_shard, the trainer, our step 0 and saving;
and DeepSpeed's ZeRO-3, where it is installed.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import transformers.training_args
import trl
from accelerate.state import DistributedType, PartialState

from dice_py.training import trainer as train_rank
from dice_py.training.launcher import main


def shard_on_cpu() -> None:
    """Tells accelerate, in this process."""
    zero = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"

    def prepare_backend(self: PartialState, *_: Any, **__: Any) -> tuple[str, DistributedType]:
        if not zero and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        return "gloo", DistributedType.MULTI_GPU

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = prepare_backend
    if zero:
        # accelerate starts DeepSpeed only where it is not told to use the CPU.
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ.pop("ACCELERATE_USE_CPU", None)
        make = trl.DPOConfig
        trl.DPOConfig = lambda **named: make(**{**named, "use_cpu": False})
        transformers.training_args.is_torch_bf16_gpu_available = lambda: True


def look(report: Any, **arguments: Any) -> dict[str, Any]:
    """What `train_rank` has set up when it reaches step 0, and no more than that."""
    counted = {"models_loaded": 0, "hashes": 0}
    found: dict[str, Any] = {}

    def counting(module: Any, name: str, count: str) -> None:
        function = getattr(module, name)

        def counted_function(*given: Any, **named: Any) -> Any:
            counted[count] += 1
            return function(*given, **named)

        setattr(module, name, counted_function)

    counting(transformers.AutoModelForCausalLM, "from_pretrained", "models_loaded")
    counting(trl.trainer.dpo_trainer, "create_model_from_path", "models_loaded")
    counting(trl.trainer.dpo_trainer, "hash_module", "hashes")

    def step0(trainer: Any, pairs: int) -> tuple[float, float]:
        model = trainer.model_wrapped
        batch = trainer.data_collator([trainer.train_dataset[0]])
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        with torch.no_grad(), trainer.compute_loss_context_manager():
            said = model(input_ids=batch["input_ids"], labels=labels, use_cache=False, fused_lm_head=True)
        policy = trainer.accelerator.state.fsdp_plugin.mixed_precision_policy
        layer = model.model.layers[0]  # in its shards again, after the forward
        weight = layer.mlp.up_proj.weight
        found.update(
            reference=trainer.ref_model,
            sharded=trainer.accelerator.is_fsdp2 and trainer.is_fsdp_enabled,
            log_probs=str(said.log_probs.dtype),
            parameters=sorted({str(value.dtype) for value in layer.parameters()}),
            computed_in=str(policy.param_dtype),
            reduced_in=str(policy.reduce_dtype),
            held_by_each=weight.to_local().numel() / weight.numel(),
        )
        raise InterruptedError

    train_rank.step0 = step0
    try:
        train_rank.train_rank(report=report, **arguments)
    except InterruptedError:
        return {**counted, **found}
    raise AssertionError("step 0 was not reached")


if __name__ == "__main__":
    shard_on_cpu()
    main()
