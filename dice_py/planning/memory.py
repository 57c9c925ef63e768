"""Peak memory of each stage, by formula from the model's size and the config.

Torch is not imported. All results are bytes. s is the length of a sequence in tokens, b the sequences of a batch, h the
hidden size, L the layers, V the vocabulary.
"""

from __future__ import annotations

from dice_py.config.run import RunConfig
from dice_py.models.sizes import DTYPE_BYTES, ModelSize

_ADAM = 8  # two moments in float32
_TILE = {"cpu": 2**20, "cuda": 2**26}  # logits that the scorer holds at the same time (scoring/scorer.py)
_SAMPLING = 20  # bytes for each logit of a decoding step: two float32 copies, the softmax, float64 sums
_HEAD_TILE = 4096 * 32768  # positions × vocabulary of TRL's fused head


def generate_memory(
    size: ModelSize, config: RunConfig, engine: str, dtype: str, longest: int, device_bytes: int | None
) -> int:
    """Peak of sampling.

    transformers: weights + key/value cache of token_budget tokens + V × 20 bytes for the logits of each row. vLLM on a
    GPU reserves gpu_memory_utilization of it; on a CPU, and with kv_cache_gib, weights + a cache of that size.

    Args:
        longest: tokens of the longest prompt.
        device_bytes: memory of one GPU; None on the CPU.
    """
    generate, each = config.generate, DTYPE_BYTES[dtype]
    weights = size.parameters * each
    if engine == "vllm":
        if device_bytes is not None and generate.vllm.kv_cache_gib is None:
            return int(generate.vllm.gpu_memory_utilization * device_bytes)
        share = max(1, generate.vllm.tensor_parallel_size)
        return weights // share + int((generate.vllm.kv_cache_gib or 1.0) * 2**30)
    limit = longest + generate.max_new_tokens
    rows = max(1, generate.token_budget // limit)
    return weights + rows * limit * size.kv_bytes_per_token * each + rows * size.vocabulary * _SAMPLING


def score_memory(sizes: list[ModelSize], config: RunConfig, dtype: str, cuda: bool) -> int:
    """Peak of scoring: the larger model's weights + activations of one batch + a tile of logits.

    Activations as in scoring/token_budget.py: 8 h + 4 × the widest part of a layer, in values for each token.
    """
    each = DTYPE_BYTES[dtype]
    budget = config.score.token_budget
    tokens = budget if budget != "auto" else 131072 if cuda else 8192
    largest = max(sizes, key=lambda size: size.parameters)
    activations = tokens * each * (8 * largest.hidden + 4 * max(largest.inner, largest.heads * largest.head_size))
    return largest.parameters * each + activations + 4 * 2 * _TILE["cuda" if cuda else "cpu"]


def lora_parameters(size: ModelSize, rank: int) -> int:
    """Parameters of adapters on all linear layers: r × (inputs + outputs) for each of a layer's seven matrices.

    Hu et al., arXiv 2106.09685: a matrix (d, k) gets (d, r) and (r, k).
    """
    kv, queries = size.kv_heads * size.head_size, size.heads * size.head_size
    attention = 2 * (size.hidden + queries) + 2 * (size.hidden + kv)
    return size.layers * rank * (attention + 3 * (size.hidden + size.inner))


def train_state(size: ModelSize, config: RunConfig, dtype: str, shards: int) -> int:
    """Weights, gradients and optimizer states of one process.

    16 bytes a parameter: float32 weights (4), gradients (4), Adam's moments (8), split over `shards` processes
    (Rajbhandari et al., arXiv 1910.02054, stage 3; float32 in place of its mixed precision). A copy of the weights in
    `dtype` is added where that is shorter. With LoRA the base is frozen, in `dtype`, and only the adapters need the 16.
    """
    each = DTYPE_BYTES[dtype]
    lora = config.train.lora
    if lora is not None:
        return size.parameters * each + 16 * lora_parameters(size, lora.r)
    copy = each if each < 4 else 0
    return size.parameters * (16 + copy) // max(1, shards)


def train_memory(size: ModelSize, config: RunConfig, dtype: str, longest_pair: int, shards: int) -> int:
    """Peak of training in one process: `train_state` + activations + a tile of the head's logits.

    Activations of a layer in 16 bit: 34 s b h bytes (Korthikanti et al., arXiv 2205.05198, eq. 1, without the scores,
    which fused attention does not keep); twice that in 32 bit. With gradient checkpointing: 2 s b h a layer, and one
    complete layer.

    Args:
        longest_pair: tokens of a prompt and the longer of its two responses.
        shards: processes that share the states (fsdp2, zero3); else 1.
    """
    each = DTYPE_BYTES[dtype]
    tokens = 2 * config.train.per_device_train_batch_size * longest_pair
    layer = 17 * each * tokens * size.hidden
    activations = layer * size.layers
    if config.train.gradient_checkpointing:
        activations = each * tokens * size.hidden * size.layers + layer
    head = 2 * 4 * min(_HEAD_TILE, tokens * size.vocabulary)
    return train_state(size, config, dtype, shards) + activations + head


def checkpoint_bytes(size: ModelSize, config: RunConfig) -> int:
    """Size of a training checkpoint: float32 weights and Adam's moments; with LoRA those of the adapters alone."""
    lora = config.train.lora
    trained = size.parameters if lora is None else lora_parameters(size, lora.r)
    return trained * (4 + _ADAM)
