"""The first process of `dice plan`: reads the prompts as the run will, and measures sampling.

Sampling is measured cold and warm, and with a small and a large number of responses, which separates fixed costs from
the costs of a step and of a token. planning/calibrate_training.py then scores these responses, makes pairs of them, and
trains on the pairs. All files are written into a folder that the caller removes.
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
from dice_py.models.tokenization import encode_prompt, load_tokenizer, stop_token_ids
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
class _SamplingRun:
    """Samples of some prompts, and the seconds that they took."""

    prompts: Sequence[Prompt]
    samples: list[Sample]
    """Prompt by prompt."""
    seconds: float

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
    eval_encoded = [] if eval_prompts is None else _encode(tokenized.tokenizer, eval_prompts)
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
        costs = _sample(config, engine, policy, tokenized, out, measure == "costs", report)
    return replace(probed, generate=costs)


def _tokenize(config: RunConfig, policy: Path, prompts: Path) -> _Tokenized:
    began = time.monotonic()
    tokenizer = load_tokenizer(policy, config.model)
    stops = stop_token_ids(policy, tokenizer)
    loaded = time.monotonic()
    encoded = _encode(tokenizer, prompts)
    encode_seconds = (time.monotonic() - loaded) / max(1, len(encoded))
    kept = [(prompt_id, ids) for prompt_id, ids in encoded if len(ids) <= config.data.max_prompt_tokens]
    if not kept:
        raise DataError(
            f"none of the {len(encoded)} prompts has at most {config.data.max_prompt_tokens} tokens; raise "
            "data.max_prompt_tokens"
        )
    return _Tokenized(tokenizer, stops, encoded, kept, loaded - began, encode_seconds)


def _encode(tokenizer: Any, file: Path) -> list[Prompt]:
    rows = read_parquet(file, ["prompt_id", "messages"]).iter_rows()
    return [(prompt_id, encode_prompt(tokenizer, messages, f"prompt {prompt_id}")) for prompt_id, messages in rows]


def _sample(
    config: RunConfig,
    engine_name: str,
    policy: Path,
    tokenized: _Tokenized,
    out: Path,
    measure_costs: bool,
    report: Report,
) -> GenerateCosts | None:
    """Samples responses and writes them into `out`; their costs, or None without `measure_costs`."""
    from dice_py.compute.memory import peak_memory
    from dice_py.generation.engines.factory import build_engine

    samples, longest = config.generate.samples, tokenized.longest
    loaded = timed_seconds().get("load", 0.0)
    engine = build_engine(
        engine_name, config.generate, device_in_group(config.model), policy, tokenized.stops, longest,
        int(tokenized.tokenizer.pad_token_id),
    )  # fmt: skip
    load = timed_seconds().get("load", 0.0) - loaded
    prompts = tokenized.kept[:: max(1, len(tokenized.kept) // _MAX_PROMPTS)][:_MAX_PROMPTS]
    few = prompts[: max(1, min(len(prompts), -(-_MIN_RESPONSES // samples)))]
    report("note", text=f"calibrating: sampling {samples} responses to each of {len(few)} prompts")
    cold = _timed_sampling(engine, config, few)
    small = large = _timed_sampling(engine, config, few) if measure_costs else cold
    count = min(len(prompts), max(2 * len(few), int(len(few) * _TARGET_SECONDS / max(small.seconds, 1e-3))))
    if count > len(few):
        report("note", text=f"calibrating: sampling {samples} responses to each of {count} prompts")
        large = _timed_sampling(engine, config, prompts[:count])
    peak = peak_memory()
    rows, continuous = engine.max_rows, engine.drops_finished_rows
    engine.close()
    began = time.monotonic()
    file = _write(large, tokenized.tokenizer, samples, out)
    written = time.monotonic() - began
    if not measure_costs:
        return None
    per_step, per_token = fit_decoding([run.decoding(rows, continuous) for run in (small, large)])
    return GenerateCosts(
        load=load,
        warm_up=max(0.0, cold.seconds - small.seconds),
        per_step=per_step,
        per_token=per_token,
        per_response=written / len(large.samples),
        rows=rows,
        continuous=continuous,
        bytes_per_response=file.stat().st_size / len(large.samples),
        peak_bytes=peak,
    )


def _timed_sampling(engine: Engine, config: RunConfig, prompts: Sequence[Prompt]) -> _SamplingRun:
    """Samples generate.samples responses to each prompt."""
    count = config.generate.samples
    began = time.monotonic()
    for at, (prompt_id, ids) in enumerate(prompts):
        seeds = [seed_for(config.seed, "plan", prompt_id, number) for number in range(count)]
        engine.add([((0, at * count + number), Request(ids, seed)) for number, seed in enumerate(seeds)])
    samples: dict[SampleId, Sample] = {}
    while engine.unfinished:
        samples.update(engine.step())
    seconds = time.monotonic() - began
    return _SamplingRun(prompts, [samples[0, row] for row in range(len(prompts) * count)], seconds)


def _write(run: _SamplingRun, tokenizer: Any, samples: int, out: Path) -> Path:
    """Writes the samples as a shard of generations."""
    file = out / GENERATED
    file.parent.mkdir(parents=True, exist_ok=True)
    shard = ShardWriter(0, file, "calibration", list(run.prompts), samples)
    for row, sample in enumerate(run.samples):
        shard.add(row, sample)
    shard.journal.flush()
    shard.write(tokenizer)
    return file
