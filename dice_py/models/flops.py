"""How much work a forward is, and how much a device can do: FLOPs, the rate of matrix products, utilisation.

Model FLOPs, forward: 2 for each weight of the layers and each token, 2 for each weight of the head and each
predicted token, and for attention 4 × heads × size of a head for each layer, query and key that it sees (two products,
a multiplication and an addition each). Of a mixture of experts only those that a token goes through are counted.
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
    """What a measurement on a device holds for: the GPU's name and memory, or the CPU's model and threads."""
    import platform

    import torch

    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return f"{found.name}, {found.total_memory / 2**30:.0f} GiB"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that its cost follows from. Weights are counts of parameters."""

    name: str
    layer_weights: int
    head_weights: int
    vocabulary: int
    hidden: int
    widest: int
    """The largest size of an activation for one token in a layer."""
    attention: int
    """Layers × heads × size of a head."""

    def flops(self, tokens: int, predicted: int, seen: int) -> int:
        """Of one forward over `tokens`, the head on `predicted` of them; `seen` counts pairs of query and key."""
        return 2 * self.layer_weights * tokens + 2 * self.head_weights * predicted + 4 * self.attention * seen


def shape_of(model: PreTrainedModel) -> Shape:
    """The shape of a loaded model."""
    config: Any = model.config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    head = model.get_output_embeddings().weight
    apart = {id(head), id(model.get_input_embeddings().weight)}
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    used = getattr(config, "num_experts_per_tok", None)
    layers = 0
    for name, weight in model.named_parameters():
        if id(weight) not in apart:
            layers += weight.numel() * used // experts if experts and used and ".experts." in name else weight.numel()
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return Shape(
        name=f"{config.model_type} {config.num_hidden_layers}x{config.hidden_size}, {head.shape[0]} tokens",
        layer_weights=layers,
        head_weights=head.numel(),
        vocabulary=head.shape[0],
        hidden=config.hidden_size,
        widest=max(inner, heads * size),
        attention=config.num_hidden_layers * heads * size,
    )


@cache
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of a large square matrix product here, the best of five; measured once in a process."""
    import torch

    size = 8192 if device.type == "cuda" else 1024
    # A generator of its own: what is drawn after a measurement must not depend on it.
    left = torch.randn(size, size, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)
    times = []
    with torch.inference_mode():
        for _ in range(6):
            started = time.perf_counter()
            left @ left
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - started)
    return 2.0 * size**3 / min(times[1:])


@dataclass
class Work:
    """What was done, added up: a shard's throughput."""

    sequences: int = 0
    tokens: int = 0
    """That a forward ran over, padding left out."""
    padded: int = 0
    """Tokens that were only padding."""
    unshared: int = 0
    """Tokens that whole sequences would have been: more than `tokens` where prompts were shared."""
    flops: int = 0
    seconds: float = 0.0

    def rates(self, peak: float) -> dict[str, Any]:
        """For the `throughput` event; `peak` in FLOPs per second."""
        ran = self.tokens + self.padded
        speed = self.flops / self.seconds if self.seconds else 0.0
        return {
            "sequences": self.sequences,
            "tokens": self.tokens,
            "unshared_tokens": self.unshared,
            "padding_share": round(self.padded / ran, 4) if ran else 0.0,
            "flops": self.flops,
            "seconds": round(self.seconds, 4),
            "tokens_per_second": round(self.tokens / self.seconds, 1) if self.seconds else None,
            "flops_per_second": round(speed),
            "matmul_flops_per_second": round(peak),
            "mfu": round(speed / peak, 4),
        }
