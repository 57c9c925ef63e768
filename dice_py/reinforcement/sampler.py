"""Samples from the policy while it is trained, by the engine on transformers' models.

The engine has a copy of the weights in the dtype that it computes in, which is brought up to date before each step. In
float32, in one process and without adapters, it has the trained weights themselves. (With vLLM, TRL keeps an engine of
its own in the trainer's process; reinforcement/trainer.py.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dice_py.config.shared import ModelConfig
from dice_py.config.stages import GenerateConfig
from dice_py.generation.engines.base import Request, Sample, sample_all
from dice_py.models.tokenization import load_tokenizer, stop_token_ids
from dice_py.models.vocabulary import KnownTokens

if TYPE_CHECKING:
    import torch


def on_policy(config: GenerateConfig) -> GenerateConfig:
    """The sampling of stage 2: the settings of `generate`, without what cuts the distribution off.

    The gradient is that of the policy that is sampled from. A nucleus, top-k, penalties and masks make it another one.
    """
    stops = {name: value for name, value in config.sampling_params.items() if name in ("stop", "stop_token_ids")}
    return config.model_copy(update={"top_p": 1.0, "top_k": 0, "sampling_params": stops})


class PolicySampler:
    """The engine, and the weights that it samples with.

    Args:
        policy: the folder that training starts from: weights, tokenizer and stop tokens.
        config: as `on_policy` makes it.
        longest_prompt: tokens.
    """

    def __init__(self, policy: Path, config: GenerateConfig, models: ModelConfig, longest_prompt: int) -> None:
        from dice_py.generation.engines.transformers import TransformersEngine

        tokenizer = load_tokenizer(policy, models)
        self.stops = stop_token_ids(policy, tokenizer)
        self.engine = TransformersEngine(
            policy,
            config,
            models,
            stops=self.stops,
            pad=int(tokenizer.pad_token_id),
            longest_prompt=longest_prompt,
            known=KnownTokens.of(tokenizer, self.stops),
        )

    def update(self, model: Any) -> None:
        """Takes over the weights of the model that is trained.

        Args:
            model: without the wrapper of several processes; with adapters, these are added to the weights.
        """
        import torch

        own = dict(self.engine.model.named_parameters())
        with torch.no_grad():
            for name, value in full_weights(model):
                held = own.get(name)
                if held is None:
                    continue  # the second name of a tied weight
                if held.dtype == value.dtype and held.device == value.device and value.is_leaf and value.requires_grad:
                    held.data = value.data
                else:
                    held.copy_(value)

    def sample(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Sample]:
        """One response to each prompt, by a seed of its own. Equal prompts next to each other share a prefill."""
        requests = [Request(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        return sample_all(self.engine, requests)


def full_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a model by their names in its files, one after another, each complete on this process's device.

    Every rank must go through all of them: where weights are sharded, gathering one is collective.
    """
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    done: list[str] = []
    for prefix, module in base.named_modules():
        if any(prefix.startswith(f"{each}.") for each in done):
            continue
        values = _of_adapted(module)
        if values is None:
            values = dict(module.named_parameters(recurse=False))
        else:
            done.append(prefix)
        for name, value in values.items():
            yield (
                f"{prefix}.{name}" if prefix else name,
                value.full_tensor() if hasattr(value, "full_tensor") else value,
            )


def _of_adapted(module: Any) -> dict[str, torch.Tensor] | None:
    """The weights of a layer with an adapter, or of one that is trained whole beside adapters; None for any other."""
    import importlib.util

    if importlib.util.find_spec("peft") is None:
        return None
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    if isinstance(module, ModulesToSaveWrapper):
        return dict(module.modules_to_save[module.active_adapters[0]].named_parameters())
    if isinstance(module, LoraLayer):
        values = dict(module.get_base_layer().named_parameters(recurse=False))
        for adapter in module.active_adapters:
            # In float32, since 16 bits would round the adapter's part away before it is added.
            values["weight"] = values["weight"].float() + module.get_delta_weight(adapter).float()
        return values
    return None
