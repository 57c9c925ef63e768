"""Peak memory of each stage, by formula from the model's size and the config. For `dice plan`, and the check of a run.

Torch is not imported. All results are bytes. h is the hidden size, L the layers, V the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dice_py.config.run import RunConfig
from dice_py.config.training import LoraConfig, TrainConfig
from dice_py.models.sizes import DTYPE_BYTES, ModelSize

_ADAM = 8  # two moments in float32
_TILE = {"cpu": 2**20, "cuda": 2**26}  # logits that the scorer holds at the same time (scoring/scorer.py)
_SAMPLING = 20  # bytes for each logit of a decoding step: two float32 copies, the softmax, float64 sums
_KEPT_LOGITS = 2**26  # entries that training keeps on a CPU (training/packed_forward.py)
_HEAD_TILE = (4096, 32768)  # positions, entries of the vocabulary: a tile of TRL's fused head
_MOST_GPUS = 64
_CHECKPOINTED = 4  # bytes of a layer's input: float32 also where linear layers compute in 16 bit


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


def lora_parameters(size: ModelSize, lora: LoraConfig) -> int:
    """Parameters of adapters on all linear layers: r × (inputs + outputs) for each of a layer's seven matrices.

    Hu et al., arXiv 2106.09685: a matrix (d, k) gets (d, r) and (r, k). Layers that are trained whole
    (`modules_to_save`) are added: h × V for the head and for embeddings; for others, a matrix is h × i in each layer,
    and a norm next to nothing.
    """
    kv, queries = size.kv_heads * size.head_size, size.heads * size.head_size
    attention = 2 * (size.hidden + queries) + 2 * (size.hidden + kv)
    adapters = size.layers * lora.r * (attention + 3 * (size.hidden + size.inner))
    return adapters + sum(_whole_parameters(size, name.rpartition(".")[2]) for name in lora.modules_to_save)


def _whole_parameters(size: ModelSize, name: str) -> int:
    if name in ("lm_head", "embed_out", "embed_in", "embed_tokens", "wte", "word_embeddings"):
        return size.hidden * size.vocabulary
    if "norm" in name or name.startswith("ln_"):
        return size.hidden * size.layers
    return size.hidden * size.inner * size.layers


def train_state(size: ModelSize, train: TrainConfig, dtype: str, shards: int) -> int:
    """Weights, gradients and optimizer states of one process.

    16 bytes a parameter: float32 weights (4), gradients (4), Adam's moments (8), split over `shards` processes
    (Rajbhandari et al., arXiv 1910.02054, stage 3; float32 in place of its mixed precision). A copy of the weights in
    `dtype` is added where that is shorter. With LoRA the base is frozen, in `dtype`, and only the adapters need the 16.
    """
    each = DTYPE_BYTES[dtype]
    lora = train.lora
    if lora is not None:
        return size.parameters * each + 16 * lora_parameters(size, lora)
    copy = each if each < 4 else 0
    return size.parameters * (16 + copy) // max(1, shards)


def _layer_bytes(size: ModelSize, train: TrainConfig, dtype: str, lean: bool) -> float:
    """Activations that a layer keeps for a token's backward pass.

    Fitted to the tensors that autograd keeps in seven shapes of Llama (hidden size 512 to 1,152), within 2 %:
    25 h + e·(4 i + 3.2 (q + k)) bytes for e bytes of the dtype, inner width i and widths q and k of queries and keys.
    The first term does not depend on the dtype, since norms and residuals stay in float32; with LoRA it is 17 h. With
    lean layers (training/lean_layers.py) it is 17 h too, and the second 2 i.
    """
    queries, keys = size.heads * size.head_size, size.kv_heads * size.head_size
    fixed, inner = (17, 2) if lean else (25, 4) if train.lora is None else (17, 4)
    return fixed * size.hidden + DTYPE_BYTES[dtype] * (inner * size.inner + 3.2 * (queries + keys))


def _head_bytes(size: ModelSize, dtype: str, tokens: int, cuda: bool) -> int:
    """The head's logits, of which all tokens are taken to predict one, and their intermediate results."""
    if cuda:  # One tile in the dtype, and the gradient of the head's weights in float32.
        tile = min(tokens, _HEAD_TILE[0]) * min(size.vocabulary, _HEAD_TILE[1])
        return DTYPE_BYTES[dtype] * tile + 4 * size.vocabulary * size.hidden
    if tokens * size.vocabulary <= _KEPT_LOGITS:
        return 2 * 4 * tokens * size.vocabulary
    return 4 * 4 * min(tokens, _HEAD_TILE[0]) * min(size.vocabulary, _HEAD_TILE[1])


def train_memory(
    size: ModelSize, train: TrainConfig, dtype: str, tokens: int, *, shards: int, cuda: bool, lean: bool = False
) -> int:
    """Peak of training in one process: `train_state` + activations of a forward + the head's logits.

    With gradient checkpointing, a layer keeps its input alone (Korthikanti et al., arXiv 2205.05198, section 5), and
    one layer is complete while it is computed again.

    Args:
        tokens: of a forward.
        shards: processes that share the states (fsdp2, zero3); else 1.
        lean: with lean layers.
    """
    layer = tokens * _layer_bytes(size, train, dtype, lean)
    activations = layer * size.layers
    if train.gradient_checkpointing:
        activations = _CHECKPOINTED * tokens * size.hidden * size.layers + layer
    return train_state(size, train, dtype, shards) + int(activations) + _head_bytes(size, dtype, tokens, cuda)


def host_memory(formula: int, base: int, processes: int = 1) -> int:
    """Of the host without a GPU: processes that hold a model, and the one that is started ahead.

    Args:
        formula: what a process needs for its model.
        base: what a process takes once it has imported its libraries.
    """
    return (formula + base) * processes + base


def gib(count: float) -> str:
    """Bytes as GiB."""
    return f"{count / 2**30:,.2f} GiB"


def shortage_text(stage: str, needed: int, available: int, memory: str) -> str:
    """A lack of memory in one sentence. `memory`: "GPU memory" or "memory"."""
    return f"{stage} needs {gib(needed)} of {memory}, and {gib(available)} are free"


@dataclass(frozen=True)
class TrainingMemory:
    """The memory of each process of a training.

    Attributes:
        prompt, response: tokens of the longest prompt and of the longest response.
        shards: processes that share the states (fsdp2, zero3); else 1.
    """

    size: ModelSize
    train: TrainConfig
    dtype: str
    prompt: int
    response: int
    processes: int = 1
    shards: int = 1
    cuda: bool = False

    def peak(self) -> int:
        """With rows of `train.packed_tokens`, or padded batches."""
        return self.train_at(self._forward_tokens(split=False))

    def least(self) -> int:
        """The memory without which training fails.

        One process splits rows that run out of memory, so that it needs room for one pair. Several do not.
        """
        return self.train_at(self._forward_tokens(split=self.processes == 1))

    def remedy(self, available: int) -> str:
        """What to set for training to fit into `available` bytes of a device: only what suffices by itself."""

        def fits(processes: int, shards: int, **changed: object) -> bool:
            train = self.train.model_copy(update=changed)
            return replace(self, train=train, processes=processes, shards=shards).least() <= available

        lora, remedies = LoraConfig(), []
        if self.train.lora is None and fits(self.processes, 1, lora=lora):
            remedies.append(f"set train.lora.r={lora.r}")
        if not self.train.gradient_checkpointing and fits(self.processes, self.shards, gradient_checkpointing=True):
            remedies.append("set train.gradient_checkpointing=true")
        if self.cuda and self.train.lora is None:
            gpus = range(self.processes + 1, _MOST_GPUS + 1)
            enough = next((count for count in gpus if fits(count, count)), None)
            fewer = next((count for count in gpus if fits(count, count, gradient_checkpointing=True)), None)
            share = "GPUs or more, which share the states (train.strategy=fsdp2)"
            if fewer is not None and (enough is None or fewer < enough):
                remedies.append(f"train with train.gradient_checkpointing=true on {fewer} {share}")
            elif enough is not None:
                remedies.append(f"train on {enough} {share}")
        return ", or ".join(remedies) or "use a smaller model, or a device with more memory"

    def train_at(self, tokens: int) -> int:
        """With forwards of `tokens` tokens."""
        plain = self.dtype == "float32" and self.processes == 1 and not self.cuda
        lean = plain and self.train.packed is not False and self.train.lora is None
        return train_memory(self.size, self.train, self.dtype, tokens, shards=self.shards, cuda=self.cuda, lean=lean)

    def _forward_tokens(self, *, split: bool) -> int:
        """Tokens of the longest forward. `split`: after rows were split as far as possible, into rows of one pair."""
        train, response = self.train, self.response
        if train.max_length is not None:
            response = max(1, min(response, train.max_length - self.prompt))
        if train.packed is False:
            return 2 * train.per_device_train_batch_size * (self.prompt + response)
        pair = self.prompt + 2 * response
        return pair if split else max(pair, min(train.row_tokens(cuda=self.cuda), train.batch_size * pair))


def checkpoint_bytes(size: ModelSize, train: TrainConfig) -> int:
    """Size of a training checkpoint: float32 weights and Adam's moments; with LoRA those of the adapters alone."""
    lora = train.lora
    trained = size.parameters if lora is None else lora_parameters(size, lora)
    return trained * (4 + _ADAM)
