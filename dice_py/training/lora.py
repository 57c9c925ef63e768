"""PEFT's config of the adapters that `train.lora` asks for, and the layers that cannot have one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dice_py.config.training import LoraConfig
from dice_py.models.loading import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def peft_config(lora: LoraConfig, model: PreTrainedModel) -> Any:
    """PEFT's config of the adapters of a model, which is not changed.

    "all-linear" leaves out `special_layers`.

    Raises:
        UsageError: PEFT is not installed.
    """
    require("peft", extra="train")
    from peft import LoraConfig as PeftLora

    return PeftLora(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        exclude_modules=(special_layers(model) or None) if lora.target_modules == "all-linear" else None,
        task_type="CAUSAL_LM",
    )


def special_layers(model: PreTrainedModel) -> list[str]:
    """The names of linear layers that return more than a tensor, as Llama 4's routers do: PEFT adds to a tensor."""
    import torch

    names = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and type(module).forward is not torch.nn.Linear.forward:
            weight = module.weight
            with torch.no_grad():
                output = module(torch.zeros(1, module.in_features, dtype=weight.dtype, device=weight.device))
            if not isinstance(output, torch.Tensor):
                names.append(name)
    return names
