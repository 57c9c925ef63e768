"""FLOPs of a forward pass, the measured FLOP rate of a device, and model FLOPs utilization (MFU).

FLOPs of a forward pass: 2 per layer weight and token, 2 per head weight and predicted token, and for attention
4 × heads × size of a head per layer and (query, key) pair: two products, of a multiplication and an addition each. In a
mixture of experts, only the experts that process a token are counted.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def device_name(device: torch.device) -> str:
    """The device for which a measurement is valid: the GPU's name and memory, or the CPU's architecture and threads."""
    import platform

    import torch

    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        return f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that determine its cost. Weights are numbers of parameters."""

    name: str
    layer_weights: int
    head_weights: int
    vocabulary: int
    hidden: int
    widest: int
    """Values in the largest activation of one token in a layer."""
    attention: int
    """Layers × heads × size of a head."""

    def flops(self, tokens: int, predicted: int, seen: int) -> int:
        """FLOPs of one forward pass.

        Args:
            tokens: tokens that go through the layers.
            predicted: tokens that go through the head.
            seen: (query, key) pairs of attention.
        """
        return 2 * self.layer_weights * tokens + 2 * self.head_weights * predicted + 4 * self.attention * seen


def shape_of(model: PreTrainedModel) -> Shape:
    """The shape of a loaded model."""
    config: Any = model.config.get_text_config()
    heads, sizes = _by_layer(config, "num_attention_heads"), _by_layer(config, "head_dim")
    attention = [
        count * (size or (config.hidden_size // count if count else 0))
        for count, size in zip(heads, sizes, strict=True)
    ]
    head = model.get_output_embeddings().weight
    embeddings = {id(head), id(model.get_input_embeddings().weight)}
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    used = getattr(config, "num_experts_per_tok", None)
    layers = 0
    for name, weight in model.named_parameters():
        if id(weight) not in embeddings:
            layers += weight.numel() * used // experts if experts and used and ".experts." in name else weight.numel()
    inner = max(_by_layer(config, "intermediate_size")) or 4 * config.hidden_size
    return Shape(
        name=f"{config.model_type} {config.num_hidden_layers}x{config.hidden_size}, {head.shape[0]} tokens",
        layer_weights=layers,
        head_weights=head.numel(),
        vocabulary=head.shape[0],
        hidden=config.hidden_size,
        widest=max(inner, *attention),
        attention=sum(attention),
    )


def _by_layer(config: Any, name: str) -> list[int]:
    """A size of each layer; 0 where the config has none. Some configs have a list, some raise where layers differ."""
    layers = config.num_hidden_layers
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # transformers' AmbiguousGlobalPerLayerAttributeError, of Gemma 4
        value = [getattr(each, name, None) for each in config.per_layer_config]
    values = list(value) if isinstance(value, list | tuple) else [value] * layers
    return [each if isinstance(each, int) else 0 for each in [*values, *[None] * layers][:layers]]


@cache
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of a large square matrix product on `device`: the best of five. Measured once per process.

    On a CPU it ends after half a second: bfloat16 can take seconds a product where the CPU has no instructions for it.
    """
    import torch

    size = 8192 if device.type == "cuda" else 1024
    # A separate generator: random numbers drawn after the measurement must not depend on it.
    left = torch.randn(size, size, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)
    times = []
    with torch.inference_mode():
        for _ in range(6):
            started = time.perf_counter()
            left @ left
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - started)
            if device.type == "cpu" and sum(times) > 0.5:
                break
    return 2.0 * size**3 / min(times[1:] or times)


@dataclass
class Work:
    """Totals over the batches of a shard."""

    sequences: int = 0
    tokens: int = 0
    """Tokens that went through the model, without padding."""
    padded: int = 0
    """Padding tokens that went through the model."""
    unshared: int = 0
    """Tokens of all sequences with their prompts: more than `tokens` if sequences shared the forward of a prompt."""
    flops: int = 0
    seconds: float = 0.0

    def rates(self, peak: float) -> dict[str, Any]:
        """The fields of the `throughput` event; `peak` is `matmul_rate`, in FLOPs per second."""
        processed = self.tokens + self.padded
        speed = self.flops / self.seconds if self.seconds else 0.0
        return {
            "sequences": self.sequences,
            "tokens": self.tokens,
            "unshared_tokens": self.unshared,
            "padding_share": round(self.padded / processed, 4) if processed else 0.0,
            "flops": self.flops,
            "seconds": round(self.seconds, 4),
            "tokens_per_second": round(self.tokens / self.seconds, 1) if self.seconds else None,
            "flops_per_second": round(speed),
            "matmul_flops_per_second": round(peak),
            "mfu": round(speed / peak, 4),
        }
