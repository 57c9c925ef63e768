"""Options that are passed on to vLLM: `generate.sampling_params` and `generate.vllm.engine_args`.

vLLM's own classes judge them, before a run spends hours: `SamplingParams` is made, and the engine's configuration is,
which needs no weights. Importing vLLM takes seconds, so it is done only where options are set, or vLLM runs anyway.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import os
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dice_py.config.passthrough import refused_by
from dice_py.config.shared import ModelConfig
from dice_py.config.stages import GenerateConfig
from dice_py.errors import UsageError
from dice_py.generation.engines.token_ids import check_token_ids
from dice_py.models.loading import Placement, placement

SAMPLING = "generate.sampling_params"
ENGINE = "generate.vllm.engine_args"

ENVIRONMENT = {
    # The engine core runs in this process, so that no child survives when the stage's process is killed.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",
}
"""Set before vLLM is imported."""

_READ_TEXT = ("stop", "bad_words", "thinking_token_budget")


def needs_tokenizer(config: GenerateConfig) -> bool:
    """Whether vLLM must know texts, and not only token ids."""
    return any(config.sampling_params.get(name) for name in _READ_TEXT)


def sampling_options(config: GenerateConfig) -> dict[str, Any]:
    """`generate.sampling_params` in the types of vLLM's `SamplingParams`.

    Raises:
        UsageError: vLLM refuses an option, with its own message.
    """
    options = config.sampling_params
    if not options:
        return {}
    from vllm import SamplingParams

    known = [name for name in SamplingParams.__struct_fields__ if not name.startswith("_")]
    library = "vLLM's SamplingParams"
    unknown = {name: value for name, value in options.items() if name not in known}
    try:
        if unknown:
            SamplingParams(**unknown)
        others = {"temperature": config.temperature, "max_tokens": config.max_new_tokens}
        # pydantic converts types, such as the keys of logit_bias, which are text in YAML and JSON.
        converted = TypeAdapter(SamplingParams).validate_python({**others, **options})
    except ValidationError as error:
        raise refused_by(library, SAMPLING, _findings(error, options)) from None
    except Exception as error:  # TypeError, and vLLM's own, which is no ValueError
        raise refused_by(library, SAMPLING, error, known) from None
    return {name: getattr(converted, name) for name in options}


def _findings(error: ValidationError, options: dict[str, Any]) -> str:
    """What pydantic says of the options; it also says that they are no SamplingParams."""
    texts = []
    for item in error.errors():
        parts = [str(part) for part in item["loc"]]
        start = next((at for at, part in enumerate(parts) if part in options), None)
        if start is not None:
            name = parts[start]
            texts.append(f"{name} is {options[name]!r:.100}: {item['msg']}")
    return "; ".join(dict.fromkeys(texts)) or str(error)


def engine_options(config: GenerateConfig) -> dict[str, Any]:
    """`generate.vllm.engine_args`, with names that vLLM has.

    Raises:
        UsageError: vLLM does not have one of them, with its own message.
    """
    options = config.vllm.engine_args
    if not options:
        return {}
    from vllm import LLM, EngineArgs

    known = [*(field.name for field in dataclasses.fields(EngineArgs)), *inspect.signature(LLM.__init__).parameters]
    unknown = {name: value for name, value in options.items() if name not in known}
    if unknown:
        try:
            EngineArgs(**unknown)
        except TypeError as error:
            raise refused_by("vLLM", ENGINE, error, known) from None
    return dict(options)


def check_options(config: GenerateConfig, models: ModelConfig, policy: Path) -> None:
    """Lets vLLM judge all options, with the policy's configuration. No weights are loaded.

    Raises:
        UsageError: vLLM refuses one, with its own message; or the policy lacks a token id that is named.
    """
    os.environ.update(ENVIRONMENT)
    sampling = sampling_options(config)
    named = [sampling.get(name) or () for name in ("stop_token_ids", "allowed_token_ids", "logit_bias")]
    if any(named):
        check_token_ids(itertools.chain(*named), models, policy)
    options = engine_options(config)
    if not options:
        return
    where = placement(models)
    check_on_cpu(options, where)
    try:
        _configure(config, models, policy, where, options)
    except Exception as error:  # of many kinds
        try:
            _configure(config, models, policy, where, {})
        except Exception:
            return  # The options are not to blame. The engine says so when it starts.
        raise refused_by("vLLM", ENGINE, error) from None


def check_on_cpu(options: dict[str, Any], where: Placement) -> None:
    """Refuses what makes vLLM fail on a CPU only after it has started."""
    if options.get("enable_chunked_prefill") and where.device == "cpu":
        raise UsageError(
            f"{ENGINE}: enable_chunked_prefill cannot be set on a CPU, where vLLM's seeded sampling fails with it; "
            "leave it out"
        )


def _configure(
    config: GenerateConfig, models: ModelConfig, policy: Path, where: Placement, options: dict[str, Any]
) -> None:
    from vllm import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    options = {name: value for name, value in options.items() if name != "chat_template"}  # of LLM only
    EngineArgs(
        model=str(policy),
        skip_tokenizer_init=True,
        trust_remote_code=models.trust_remote_code,
        dtype=where.dtype,
        generation_config="vllm",
        max_model_len=config.vllm.max_model_len,
        enforce_eager=True,
        tensor_parallel_size=config.vllm.tensor_parallel_size,
        **options,
    ).create_engine_config(UsageContext.LLM_CLASS)
