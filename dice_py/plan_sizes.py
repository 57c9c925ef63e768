"""How large things are before they are made: a model's weights from its files' headers, and a stage's peak memory.

No weights are read and torch is not imported. Bytes throughout; s is a sequence's length in tokens, b a batch's
sequences, h the hidden size, L the layers, V the vocabulary.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dice_py.artefacts import digest, read_json
from dice_py.config import RunConfig
from dice_py.errors import DataError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_STORED = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "I32": 4, "I64": 8}
_ADAM = 8  # two moments in float32
_TILE = {"cpu": 2**20, "cuda": 2**26}  # logits that the scorer holds at one time (dice_py/logps.py)
_SAMPLED = 20  # bytes for each entry of a step's logits: two float32 copies, the softmax, float64 sums
_HEAD_TILE = 4096 * 32768  # positions × vocabulary of TRL's fused head
_NAMES = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")


@dataclass(frozen=True)
class ModelSize:
    """A model folder's sizes. Of an adapter the layers are unknown: zeros, and only its own weights are counted."""

    parameters: int
    stored_bytes: int
    """Of the weights' files."""
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    vocabulary: int
    shape: str
    """Equal for models of one architecture and size, whatever their weights."""

    @property
    def kv_bytes_per_token(self) -> int:
        """Values of a token in the key/value cache: 2 × L × key/value heads × size of a head."""
        return 2 * self.layers * self.kv_heads * self.head_size


def _header(file: Path) -> dict[str, Any]:
    """A safetensors header: u64 length, then JSON."""
    try:
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > file.stat().st_size:
                raise ValueError("the header is longer than the file")
            return dict(json.loads(handle.read(length)))
    except (OSError, ValueError, struct.error) as error:
        raise DataError(f"{file} is not whole safetensors ({error}); download or save it again") from None


def model_size(folder: Path) -> ModelSize:
    """The sizes of the model in a folder, from config.json and the headers of its weights.

    Raises:
        DataError: a file of weights that is cut off.
    """
    file = folder / "config.json"
    config = read_json(file) if file.is_file() else {}
    text = config.get("text_config") or config
    parameters = stored = 0
    for weights in sorted(folder.glob("*.safetensors")):
        stored += weights.stat().st_size
        for name, tensor in _header(weights).items():
            if name != "__metadata__" and tensor["dtype"] in _STORED:
                parameters += math.prod(tensor["shape"])
    if not parameters:  # an older format, in which a size is all that there is to see
        stored = sum(weights.stat().st_size for weights in folder.glob("pytorch_model*.bin"))
        parameters = stored // DTYPE_BYTES.get(str(config.get("dtype") or config.get("torch_dtype")), 4)
    hidden = int(text.get("hidden_size") or 0)
    heads = int(text.get("num_attention_heads") or 0)
    return ModelSize(
        parameters=parameters,
        stored_bytes=stored,
        hidden=hidden,
        layers=int(text.get("num_hidden_layers") or 0),
        heads=heads,
        kv_heads=int(text.get("num_key_value_heads") or heads),
        head_size=int(text.get("head_dim") or (hidden // heads if heads else 0)),
        inner=int(text.get("intermediate_size") or 4 * hidden),
        vocabulary=int(text.get("vocab_size") or 0),
        shape=digest({k: v for k, v in config.items() if k not in _NAMES and not k.endswith("token_id")}, parameters),
    )


def generate_memory(
    size: ModelSize, config: RunConfig, engine: str, dtype: str, longest: int, device_bytes: int | None
) -> int:
    """Peak of sampling.

    transformers: weights + key/value cache of token_budget tokens + V × 20 bytes for each row's logits. vLLM on a GPU
    takes what it is told to (gpu_memory_utilization of the device); on a CPU its cache has the size it is given.

    Args:
        longest: tokens of the longest prompt.
        device_bytes: of one GPU; None on the CPU.
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
    return weights + rows * limit * size.kv_bytes_per_token * each + rows * size.vocabulary * _SAMPLED


def score_memory(sizes: list[ModelSize], config: RunConfig, dtype: str, cuda: bool) -> int:
    """Peak of scoring: the larger model's weights + activations of one batch + a tile of logits.

    Activations, as dice_py/token_budget.py expects them: (8 h + 4 × the widest of a layer) values for each token.
    """
    each = DTYPE_BYTES[dtype]
    given = config.score.token_budget
    tokens = given if given != "auto" else 131072 if cuda else 8192
    largest = max(sizes, key=lambda size: size.parameters)
    activations = tokens * each * (8 * largest.hidden + 4 * max(largest.inner, largest.heads * largest.head_size))
    return largest.parameters * each + activations + 4 * 2 * _TILE["cuda" if cuda else "cpu"]


def lora_parameters(size: ModelSize, rank: int) -> int:
    """Of adapters on all linear layers: r × (inputs + outputs) for each of a layer's seven matrices.

    Hu et al., arXiv 2106.09685: a matrix (d, k) gets (d, r) and (r, k).
    """
    kv, queries = size.kv_heads * size.head_size, size.heads * size.head_size
    attention = 2 * (size.hidden + queries) + 2 * (size.hidden + kv)
    return size.layers * rank * (attention + 3 * (size.hidden + size.inner))


def train_state(size: ModelSize, config: RunConfig, dtype: str, shards: int) -> int:
    """Weights, gradients and optimizer states of one process.

    16 bytes a parameter: float32 weights (4), gradients (4), Adam's moments (8), split over `shards` processes
    (Rajbhandari et al., arXiv 1910.02054, stage 3; float32 in place of its mixed precision); where it computes in a
    shorter type, that copy of the weights too. With LoRA the base is frozen, in its computing type, and only the
    adapters have the 16.
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
    which fused attention does not keep); twice that in 32 bit. Checkpointed: 2 s b h a layer, and one layer whole.

    Args:
        longest_pair: tokens of prompt and response, the longer of the two.
        shards: processes that share the states (fsdp2, zero3); else 1.
    """
    each = DTYPE_BYTES[dtype]
    tokens = 2 * config.train.micro_batch_size * longest_pair
    layer = 17 * each * tokens * size.hidden
    activations = layer * size.layers
    if config.train.gradient_checkpointing:
        activations = each * tokens * size.hidden * size.layers + layer
    head = 2 * 4 * min(_HEAD_TILE, tokens * size.vocabulary)
    return train_state(size, config, dtype, shards) + activations + head


def checkpoint_bytes(size: ModelSize, config: RunConfig) -> int:
    """One training checkpoint: float32 weights and Adam's moments; with LoRA of the adapters alone."""
    lora = config.train.lora
    trained = size.parameters if lora is None else lora_parameters(size, lora.r)
    return trained * (4 + _ADAM)
