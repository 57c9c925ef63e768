"""The first process of `dice plan`: reads the prompts as the run will, and measures sampling.

A cold run of a few tokens shows what a step takes. Where complete responses are cheap, they are sampled for a small and
a large number of prompts, which separates the costs of a step and of a token. Else (planning/calibration_sizes.py)
many rows are decoded for a few tokens, and few rows for complete responses, or up to a limit of tokens.

planning/calibrate_scoring.py then scores these responses and makes pairs of them, and planning/calibrate_training.py
trains. All files are written into a folder that the caller removes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dice_py.compute.devices import Group, device_in_group, find_groups, only_these_gpus
from dice_py.config.run import RunConfig
from dice_py.errors import DataError
from dice_py.events import Report, no_report
from dice_py.generation.engines.base import Engine, Request, Sample, SampleId
from dice_py.generation.engines.vllm_on_cpu import Workload
from dice_py.generation.shard import Prompt, ShardWriter
from dice_py.models.loading import placement
from dice_py.models.tokenization import encode_prompts, load_tokenizer, stop_token_ids
from dice_py.models.vocabulary import KnownTokens
from dice_py.planning.calibration_sizes import (
    SAMPLING_SECONDS,
    Step,
    complete_sampling_fits,
    first_prompts,
    reduced_sampling,
)
from dice_py.planning.decoding import decode_steps, fit_decoding
from dice_py.runs.measured_costs import GenerateCosts
from dice_py.storage.keys import seed_for
from dice_py.storage.parquet import read_parquet
from dice_py.timing import timed_seconds
from dice_py.training.parallelism import ProcessLayout, lay_out

GENERATED = "generations-00000.parquet"
"""The file of the responses that `probe` sampled."""
_TARGET_SECONDS = 3.0  # of the large measurement
_MIN_RESPONSES = 64  # of the small measurement
_MAX_PROMPTS = 512
_FEW_TOKENS = 5  # of the first responses
_FEW_PROMPT_TOKENS = 512  # of their prompts
_FEWER_SAMPLES = 1  # of a prompt, where complete responses are not cheap: lengths depend on the prompt


@dataclass(frozen=True)
class Probe:
    """The run's engine, devices, memory and prompts, and what sampling costs."""

    engine: str
    dtype: str
    device: str
    """Its name, such as "NVIDIA H100"."""
    cuda: bool
    groups: int
    """Groups of devices."""
    gpus: int
    """GPUs of all groups."""
    gpu_names: tuple[str, ...]
    """GPUs of the first group, as CUDA_VISIBLE_DEVICES names them."""
    threads: int | None
    """Threads of each group's process; None: torch's default."""
    layout: ProcessLayout
    """How training is spread over processes."""
    host_free_bytes: int
    gpu_free_bytes: int | None
    gpu_bytes: int | None
    base_memory_bytes: int
    """Host memory of a process that has imported its libraries."""
    prompt_tokens: dict[int, int]
    """By prompt_id: the prompt's tokens."""
    eval_prompt_tokens: list[int]
    tokenizer_seconds: float
    """For loading the tokenizer."""
    encode_seconds: float
    """For tokenizing one prompt."""
    generate: GenerateCosts | None = None
    """None: not measured."""
    cut_at: int | None = None
    """Tokens at which sampled responses were cut; None: at generate.max_new_tokens."""


@dataclass(frozen=True)
class _Tokenized:
    """The run's prompts and the policy's tokenizer."""

    tokenizer: Any
    stops: list[int]
    prompts: list[Prompt]
    kept: list[Prompt]
    """Those within data.max_prompt_tokens."""
    tokenizer_seconds: float
    encode_seconds: float

    @property
    def longest(self) -> int:
        """Tokens of the longest kept prompt."""
        return max(len(ids) for _, ids in self.kept)


@dataclass(frozen=True)
class SamplingRun:
    """Samples of some prompts, and the seconds that they took."""

    prompts: Sequence[Prompt]
    samples: list[Sample]
    """Prompt by prompt."""
    seconds: float

    @property
    def prompt_tokens(self) -> int:
        """Each prompt counted once."""
        return sum(len(ids) for _, ids in self.prompts)

    @property
    def step(self) -> Step:
        """The mean step, with its share of the prompts' prefill."""
        return Step(len(self.samples), self.seconds / max(len(sample.token_ids) for sample in self.samples))

    def step_without(self, per_prompt_token: float) -> Step:
        """The mean step but for the first, whose tokens come from the prefill at these seconds a token."""
        steps = max(len(sample.token_ids) for sample in self.samples) - 1
        return Step(len(self.samples), max(0.0, self.seconds - per_prompt_token * self.prompt_tokens) / max(1, steps))

    def decoding(self, rows: int, continuous: bool) -> tuple[int, int, float]:
        """(steps, tokens, seconds)."""
        lengths = [len(sample.token_ids) for sample in self.samples]
        return decode_steps(lengths, rows, continuous), sum(lengths), self.seconds


def probe(
    *,
    config: RunConfig,
    policy: Path,
    prompts: Path,
    eval_prompts: Path | None,
    workload: Workload,
    out: Path,
    measure: Literal["costs", "lengths", "nothing"],
    report: Report = no_report,
) -> Probe:
    """Reads the prompts, chooses engine and devices, and samples into `out`.

    Args:
        prompts, eval_prompts: Parquet with `prompt_id` and `messages`.
        workload: what a round samples; `generate.engine=auto` follows from it.
        measure: "costs": samples, and measures the costs; "lengths": only samples, for the lengths of responses;
            "nothing": does not sample.

    Raises:
        UsageError, DataError: the same errors that would stop the run itself.
    """
    import torch

    from dice_py.compute.memory import free_host_memory, resident_memory
    from dice_py.generation.engines.factory import choose_engine
    from dice_py.generation.limits import check_fits
    from dice_py.models.flops import device_name

    base_memory = resident_memory("VmRSS")
    engine, _ = choose_engine(config.generate, config.model, workload)
    groups = find_groups(
        config.devices, config.model, size=config.generate.vllm.tensor_parallel_size if engine == "vllm" else 1
    )
    layout = lay_out(config.train, config.model, config.devices)
    tokenized = _tokenize(config, policy, prompts)
    eval_encoded = [] if eval_prompts is None else _encode(config, tokenized.tokenizer, eval_prompts)
    largest_id = max(max(ids) for _, ids in tokenized.kept)
    check_fits(policy, config.model, tokenized.longest, largest_id, config.generate.max_new_tokens)
    with only_these_gpus(Group(1, groups[0].gpus)):
        if groups[0].threads is not None:
            torch.set_num_threads(groups[0].threads)
        where = placement(device_in_group(config.model))
        device = torch.device(where.device)
        cuda = device.type == "cuda"
        gpu_free, gpu_total = torch.cuda.mem_get_info(device) if cuda else (None, None)
        probed = Probe(
            engine=engine,
            dtype=where.dtype,
            device=device_name(device),
            cuda=cuda,
            groups=len(groups),
            gpus=sum(len(group.gpus) for group in groups),
            gpu_names=groups[0].gpus,
            threads=groups[0].threads,
            layout=layout,
            host_free_bytes=free_host_memory(),
            gpu_free_bytes=gpu_free,
            gpu_bytes=gpu_total,
            base_memory_bytes=base_memory,
            prompt_tokens={prompt_id: len(ids) for prompt_id, ids in tokenized.prompts},
            eval_prompt_tokens=[len(ids) for _, ids in eval_encoded],
            tokenizer_seconds=tokenized.tokenizer_seconds,
            encode_seconds=tokenized.encode_seconds,
        )
        if measure == "nothing":
            return probed
        costs, cut_at = _sample(config, engine, policy, tokenized, out, report)
    return replace(probed, generate=costs if measure == "costs" else None, cut_at=cut_at)


def _tokenize(config: RunConfig, policy: Path, prompts: Path) -> _Tokenized:
    began = time.monotonic()
    tokenizer = load_tokenizer(policy, config.model)
    stops = stop_token_ids(policy, tokenizer)
    loaded = time.monotonic()
    encoded = _encode(config, tokenizer, prompts)
    encode_seconds = (time.monotonic() - loaded) / max(1, len(encoded))
    kept = [(prompt_id, ids) for prompt_id, ids in encoded if len(ids) <= config.data.max_prompt_tokens]
    if not kept:
        raise DataError(
            f"none of the {len(encoded)} prompts has at most {config.data.max_prompt_tokens} tokens; raise "
            "data.max_prompt_tokens"
        )
    return _Tokenized(tokenizer, stops, encoded, kept, loaded - began, encode_seconds)


def _encode(config: RunConfig, tokenizer: Any, file: Path) -> list[Prompt]:
    return encode_prompts(read_parquet(file), tokenizer, rule=config.data.bad_rows)


def _sample(
    config: RunConfig, engine_name: str, policy: Path, tokenized: _Tokenized, out: Path, report: Report
) -> tuple[GenerateCosts, int | None]:
    """Samples responses and writes them into `out`; returns their costs, and the tokens at which they were cut."""
    from dice_py.compute.memory import peak_memory
    from dice_py.generation.engines.factory import build_engine

    loaded = timed_seconds().get("load", 0.0)
    engine = build_engine(
        engine_name, config.generate, device_in_group(config.model), policy, tokenized.stops, tokenized.longest,
        int(tokenized.tokenizer.pad_token_id), KnownTokens.of(tokenized.tokenizer, tokenized.stops),
    )  # fmt: skip
    load = timed_seconds().get("load", 0.0) - loaded
    measured = Sampler(engine, config, tokenized.kept, report).measure()
    peak = peak_memory()
    rows, continuous = engine.max_rows, engine.drops_finished_rows
    engine.close()
    began = time.monotonic()
    kept = measured.kept
    file = _write(kept, tokenized.tokenizer, len(kept.samples) // len(kept.prompts), out)
    written = time.monotonic() - began
    per_step, per_token = fit_decoding(measured.decoding(rows, continuous))
    steps, tokens, seconds = measured.cold.decoding(rows, continuous)
    warm = per_step * steps + per_token * tokens + measured.per_prompt_token * measured.cold.prompt_tokens
    return GenerateCosts(
        load=load,
        warm_up=max(0.0, seconds - warm),
        per_prompt_token=measured.per_prompt_token,
        per_step=per_step,
        per_token=per_token,
        per_response=written / len(kept.samples),
        rows=rows,
        continuous=continuous,
        bytes_per_response=file.stat().st_size / len(kept.samples),
        peak_bytes=peak,
    ), measured.cut_at


@dataclass(frozen=True)
class Measured:
    """The samples of a calibration."""

    cold: SamplingRun
    runs: tuple[SamplingRun, SamplingRun]
    """The runs that separate the costs of steps and tokens."""
    first: SamplingRun | None
    """First tokens alone: what prompts cost. None: prompts are not separated."""
    cut_at: int | None
    """Tokens at which the last of `runs` was cut; None: at generate.max_new_tokens."""

    @property
    def kept(self) -> SamplingRun:
        """The responses that are scored, and whose lengths count."""
        return self.runs[-1]

    def decoding(self, rows: int, continuous: bool) -> list[tuple[int, int, float]]:
        """(steps, tokens, seconds) of `runs`; where prompts are separate, without the first tokens, which they give."""
        counts = [run.decoding(rows, continuous) for run in self.runs]
        if self.first is None:
            return counts
        return [
            (steps - 1, tokens - len(run.samples), seconds - self.per_prompt_token * run.prompt_tokens)
            for run, (steps, tokens, seconds) in zip(self.runs, counts, strict=True)
        ]

    @property
    def per_prompt_token(self) -> float:
        """Seconds; 0: part of the tokens' cost."""
        return 0.0 if self.first is None else self.first.seconds / max(1, self.first.prompt_tokens)


class Sampler:
    """Samples with an engine, as much as fits into the seconds of a calibration."""

    def __init__(self, engine: Engine, config: RunConfig, kept: Sequence[Prompt], report: Report) -> None:
        self.engine, self.config, self.report = engine, config, report
        self.prompts = kept[:: max(1, len(kept) // _MAX_PROMPTS)][:_MAX_PROMPTS]

    def measure(self) -> Measured:
        """The cold run, and what it leaves time for."""
        samples, tokens = self.config.generate.samples, self.config.generate.max_new_tokens
        began = time.monotonic()
        lengths = [len(ids) for _, ids in self.prompts]
        few = self.prompts[: first_prompts(lengths, samples, _MIN_RESPONSES, _FEW_PROMPT_TOKENS)]
        brief = min(tokens, _FEW_TOKENS)
        cold = self.run(few, samples, brief)
        if complete_sampling_fits(cold.step, tokens):
            return self._complete(cold, few)
        # Other prompts each time where there are enough, since an engine may keep a prompt's cache.
        warm = self.run(self._others(1, len(few)), samples, brief)
        if complete_sampling_fits(warm.step, tokens):
            return self._complete(cold, few)
        first = self.run(self._others(2, len(few)), samples, 1)
        fewer = self.run(self._others(3, len(few)), _FEWER_SAMPLES, brief)
        prefill = first.seconds / max(1, first.prompt_tokens)
        size = reduced_sampling(
            [fewer.step_without(prefill), warm.step_without(prefill)],
            first.seconds / len(few),
            tokens,
            _FEWER_SAMPLES,
            min(len(self.prompts), _MIN_RESPONSES // _FEWER_SAMPLES),
            SAMPLING_SECONDS - (time.monotonic() - began),
        )
        spread = self.prompts[:: max(1, len(self.prompts) // size.prompts)][: size.prompts]
        self._note(_FEWER_SAMPLES, len(spread), f", at most {size.tokens} tokens" if size.tokens < tokens else "")
        long = self.run(spread, _FEWER_SAMPLES, size.tokens)
        # Steps and tokens are separated by runs with different numbers of rows.
        rows = [len(run.samples) for run in (fewer, warm, long)]
        other = warm if abs(rows[1] - rows[2]) > abs(rows[0] - rows[2]) else fewer
        return Measured(cold, (other, long), first, size.tokens if size.tokens < tokens else None)

    def _others(self, number: int, count: int) -> list[Prompt]:
        """The `number`th `count` prompts, counted in a circle."""
        return [self.prompts[(number * count + at) % len(self.prompts)] for at in range(count)]

    def _complete(self, cold: SamplingRun, few: Sequence[Prompt]) -> Measured:
        """Complete responses to few prompts, and to more."""
        samples, tokens = self.config.generate.samples, self.config.generate.max_new_tokens
        self._note(samples, len(few))
        small = large = self.run(few, samples, tokens)
        count = max(2 * len(few), int(len(few) * _TARGET_SECONDS / max(small.seconds, 1e-3)))
        count = min(len(self.prompts), count)
        if count > len(few):
            self._note(samples, count)
            large = self.run(self.prompts[:count], samples, tokens)
        return Measured(cold, (small, large), None, None)

    def _note(self, samples: int, prompts: int, limit: str = "") -> None:
        self.report("note", text=f"calibrating: sampling {samples} responses to each of {prompts} prompts{limit}")

    def run(self, prompts: Sequence[Prompt], samples: int, tokens: int) -> SamplingRun:
        """Samples `samples` responses to each prompt, of at most `tokens` tokens."""
        self.engine.max_new_tokens = tokens
        began = time.monotonic()
        for at, (prompt_id, ids) in enumerate(prompts):
            seeds = [seed_for(self.config.seed, "plan", prompt_id, number) for number in range(samples)]
            self.engine.add([((0, at * samples + number), Request(ids, seed)) for number, seed in enumerate(seeds)])
        done: dict[SampleId, Sample] = {}
        while self.engine.unfinished:
            done.update(self.engine.step())
        seconds = time.monotonic() - began
        return SamplingRun(prompts, [done[0, row] for row in range(len(prompts) * samples)], seconds)


def _write(run: SamplingRun, tokenizer: Any, samples: int, out: Path) -> Path:
    """Writes the samples as a shard of generations."""
    file = out / GENERATED
    file.parent.mkdir(parents=True, exist_ok=True)
    shard = ShardWriter(0, file, "calibration", list(run.prompts), samples)
    for row, sample in enumerate(run.samples):
        shard.add(row, sample)
    shard.journal.flush()
    shard.write(tokenizer)
    return file
