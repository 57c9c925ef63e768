"""PEFT's config of the adapters that `train.lora` asks for, layers that cannot have one, and the adapter's folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dice_py.config.extras import require
from dice_py.config.training import LoraConfig
from dice_py.events import Report
from dice_py.models.saving import share_mode
from dice_py.storage.files import atomic
from dice_py.storage.integrity import read_stamp, set_aside, write_stamp

if TYPE_CHECKING:
    import torch
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
        use_rslora=lora.use_rslora,
        target_modules=lora.target_modules,
        exclude_modules=(special_layers(model) or None) if lora.target_modules == "all-linear" else None,
        modules_to_save=modules_to_save(lora, model) or None,
        task_type="CAUSAL_LM",
    )


def modules_to_save(lora: LoraConfig, model: PreTrainedModel) -> list[str]:
    """PEFT's names of the layers that are trained whole: those of the config, or the layers' full names.

    PEFT takes each module whose name ends with one of these letters: "norm" would also be "input_layernorm".
    """
    names = [name for name, _ in model.named_modules()]
    meant = [name for name in names if any(_is_named(name, given) for given in lora.modules_to_save)]
    taken = [name for name in names if any(name.endswith(given) for given in lora.modules_to_save)]
    return lora.modules_to_save if meant == taken else meant


def _is_named(name: str, given: str) -> bool:
    return name == given or name.endswith(f".{given}")


def layers_of(given: str, model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """The modules that a name of `train.lora.modules_to_save` means, by their full names."""
    return {name: module for name, module in model.named_modules() if _is_named(name, given)}


def hold_in_float32(model: torch.nn.Module) -> None:
    """Puts the layers that are trained whole into float32, as PEFT does with adapters: 16 bits lose small updates."""
    from peft.utils import ModulesToSaveWrapper

    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save.float()


def adapter_weights(wrapped: Any) -> dict[str, torch.Tensor]:
    """A copy of the weights of a PeftModel's adapter, and of the layers trained whole, as PEFT saves them."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    return {name: value.detach().to(device="cpu", copy=True).contiguous() for name, value in state.items()}


def save_adapter(
    folder: Path, config: Any, weights: dict[str, torch.Tensor], *, base: Path, stamp: dict[str, Any], report: Report
) -> None:
    """Writes an adapter atomically as PEFT does, with a stamp of its files.

    Args:
        folder: one that is there and carries no stamp is not this program's, and is set aside.
        config: PEFT's config of the adapter.
        base: the model that it was trained on, which adapter_config.json names.
        stamp: has the `key` of the training.
    """
    from safetensors.torch import save_file

    if folder.exists() and read_stamp(folder) is None:
        set_aside(folder, report, "is not of this training, or is damaged")
    for name, value in vars(config).items():
        if isinstance(value, set):  # which PEFT writes in an order that differs between processes
            setattr(config, name, sorted(value))
    config.base_model_name_or_path = str(base)
    config.inference_mode = True
    with atomic(folder) as temporary:
        config.save_pretrained(temporary)
        save_file(weights, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        share_mode(temporary, temporary / "adapter_config.json")
        write_stamp(temporary, stamp)


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
