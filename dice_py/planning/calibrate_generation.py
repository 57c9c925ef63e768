"""What `dice plan` measures, in processes of its own: small pieces of the very work that a run does.

`look` reads the prompts as the run will, and, where no figures are remembered for the model's shape and the device,
samples. planning/calibrate_training.py scores these samples, and trains a few steps on pairs made of them. Each is run
once cold and once warm, and at two sizes, so that what is paid once and what is paid for each unit are told apart.
Everything is written into a folder that the caller removes.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from dice_py.compute.devices import Group, device_in_group, find_groups, only_these_gpus
from dice_py.compute.memory import peak_memory, resident_memory
from dice_py.compute.worker import Worker
from dice_py.config.run import RunConfig
from dice_py.errors import DataError
from dice_py.events import Report, no_report
from dice_py.generation.engines.base import Request, Sample, SampleId
from dice_py.generation.shard import ShardWriter
from dice_py.models.loading import placement
from dice_py.models.tokenization import encode_prompt, load_tokenizer, stop_token_ids
from dice_py.storage.keys import seed_for
from dice_py.storage.parquet import read_parquet
from dice_py.timing import timed_seconds

GENERATED = "generations-00000.parquet"
"""The file of the responses that `probe` sampled."""
_TARGET = 3.0  # seconds that the larger of two measurements of sampling is to take
_LEAST = 64  # responses of the smaller one
_MOST_PROMPTS = 512


def _use_threads(group: Group) -> None:
    """The share of the cores that the group has in the run."""
    if group.threads is not None:
        import torch

        torch.set_num_threads(group.threads)


def probe(
    *,
    config: RunConfig,
    policy: Path,
    prompts: Path,
    eval_prompts: Path | None,
    out: Path,
    measure: Literal["all", "lengths", "nothing"],
    report: Report = no_report,
) -> dict[str, Any]:
    """Prompts' lengths, engine, devices and their memory, and figures of sampling, whose responses are in `out`.

    Args:
        prompts, eval_prompts: Parquet with `prompt_id` and `messages`.
        measure: all; or only to have responses, whose lengths are wanted; or nothing.

    Raises:
        UsageError, DataError: what the run itself would be refused for.
    """
    import torch

    from dice_py.compute.memory import free_host_memory
    from dice_py.generation.engines.factory import choose_engine
    from dice_py.generation.limits import check_fits
    from dice_py.models.flops import device_name
    from dice_py.training.parallelism import lay_out

    base_memory = resident_memory("VmRSS")
    engine, why = choose_engine(config.generate, config.model)
    groups = find_groups(
        config.devices, config.model, size=config.generate.vllm.tensor_parallel_size if engine == "vllm" else 1
    )
    layout = lay_out(config.train, config.model, config.devices)
    began = time.monotonic()
    tokenizer = load_tokenizer(policy, config.model)
    stops = stop_token_ids(policy, tokenizer)
    tokenizer_seconds = time.monotonic() - began
    encoded = _encoded(tokenizer, prompts)
    encode_seconds = (time.monotonic() - began - tokenizer_seconds) / max(1, len(encoded))
    kept = [(prompt_id, ids) for prompt_id, ids in encoded if len(ids) <= config.data.max_prompt_tokens]
    if not kept:
        raise DataError(
            f"none of the {len(encoded)} prompts has at most {config.data.max_prompt_tokens} tokens; raise "
            "data.max_prompt_tokens"
        )
    held_out = [] if eval_prompts is None else [len(ids) for _, ids in _encoded(tokenizer, eval_prompts)]
    longest = max(len(ids) for _, ids in kept)
    check_fits(policy, config.model, longest, max(max(ids) for _, ids in kept), config.generate.max_new_tokens)
    with only_these_gpus(Group(1, groups[0].gpus)):
        _use_threads(groups[0])
        where = placement(device_in_group(config.model))
        device = torch.device(where.device)
        name = device_name(device)
        room: dict[str, int | None] = {"host_free_bytes": free_host_memory(), "gpu_free_bytes": None, "gpu_bytes": None}
        if device.type == "cuda":
            room["gpu_free_bytes"], room["gpu_bytes"] = torch.cuda.mem_get_info(device)
        found = {
            "engine": engine,
            "engine_reason": why,
            "dtype": where.dtype,
            "device": name,
            "cuda": device.type == "cuda",
            "groups": len(groups),
            "gpus": sum(len(group.gpus) for group in groups),
            "gpu_names": groups[0].gpus,
            "threads": groups[0].threads,
            "layout": layout,
            "room": room,
            "base_memory_bytes": base_memory,
            "prompt_ids": [prompt_id for prompt_id, _ in encoded],
            "prompt_tokens": [len(ids) for _, ids in encoded],
            "eval_prompt_tokens": held_out,
            "tokenizer_seconds": tokenizer_seconds,
            "encode_seconds": encode_seconds,
            "generate": None,
        }
        if measure != "nothing":
            taken = kept[:: max(1, len(kept) // _MOST_PROMPTS)][:_MOST_PROMPTS]
            found["generate"] = _sample(
                config, engine, policy, tokenizer, stops, longest, taken, out, measure == "all", report
            )
    return found


def _encoded(tokenizer: Any, file: Path) -> list[tuple[int, list[int]]]:
    rows = read_parquet(file, ["prompt_id", "messages"]).iter_rows()
    return [(prompt_id, encode_prompt(tokenizer, messages, f"prompt {prompt_id}")) for prompt_id, messages in rows]


def _sample(
    config: RunConfig,
    engine: str,
    policy: Path,
    tokenizer: Any,
    stops: list[int],
    longest: int,
    prompts: list[tuple[int, list[int]]],
    out: Path,
    whole: bool,
    report: Report,
) -> dict[str, Any]:
    """Figures of sampling. Not `whole`: for the responses alone."""
    from dice_py.generation.engines.factory import build_engine

    settings = config.generate
    samples = settings.samples
    loaded = timed_seconds().get("load", 0.0)
    sampler = build_engine(
        engine, settings, device_in_group(config.model), policy, stops, longest, int(tokenizer.pad_token_id)
    )
    load = timed_seconds().get("load", 0.0) - loaded

    def sample(taken: list[tuple[int, list[int]]]) -> tuple[float, dict[SampleId, Sample]]:
        began = time.monotonic()
        for at, (prompt_id, ids) in enumerate(taken):
            seeds = [seed_for(config.seed, "plan", prompt_id, number) for number in range(samples)]
            sampler.add([((0, at * samples + number), Request(ids, seed)) for number, seed in enumerate(seeds)])
        found: dict[SampleId, Sample] = {}
        while sampler.unfinished:
            found.update(sampler.step())
        return time.monotonic() - began, found

    few = prompts[: max(1, min(len(prompts), -(-_LEAST // samples)))]
    report("note", text=f"calibrating: sampling {samples} responses to each of {len(few)} prompts")
    cold, made = sample(few)
    warm, _ = sample(few) if whole else (cold, made)
    count = min(len(prompts), max(2 * len(few), int(len(few) * _TARGET / max(warm, 1e-3))))
    many, seconds, small = prompts[:count], warm, made
    if count > len(few):
        report("note", text=f"calibrating: sampling {samples} responses to each of {count} prompts")
        seconds, made = sample(many)
    peak = peak_memory()
    rows, joins = sampler.max_rows, sampler.drops_finished_rows
    beside = beside_import(lambda: sample(many)[0], seconds) if whole and not on_gpu(config) else None
    sampler.close()
    ordered = [made[0, row] for row in range(len(many) * samples)]
    file = out / GENERATED
    file.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    shard = ShardWriter(0, file, "calibration", many, samples)
    for row, one in enumerate(ordered):
        shard.add(row, one)
    shard.journal.flush()
    shard.write(tokenizer)
    written = time.monotonic() - began
    return {
        "load": load,
        "first": max(0.0, cold - warm),
        "runs": [
            {"lengths": [len(found[0, row].token_ids) for row in range(len(taken) * samples)], "seconds": took}
            for taken, found, took in ((few, small, warm), (many, made, seconds))
        ],
        "rows": rows,
        "joins": joins,
        "per_response": written / len(ordered),
        "bytes_per_response": file.stat().st_size / len(ordered),
        "peak": peak,
        "beside": beside,
    }


def on_gpu(config: RunConfig) -> bool:
    """Whether models are held on a GPU."""
    return placement(config.model.model_copy(update={"dtype": "float32"})).device != "cpu"


def _nothing(report: Report) -> None:
    """Work for a process that is only to import."""


def beside_import(work: Callable[[], float], alone: float) -> dict[str, float]:
    """How fast `work` goes on while another process imports, and how long that takes.

    Args:
        work: returns the seconds that it took; called until the other has imported.
        alone: its seconds alone.

    Returns:
        `work`: share of the speed that it has alone; `start`: the import's, where it is known; `seconds`: until the
        process had imported.
    """
    if len(os.sched_getaffinity(0)) == 1:
        return {"work": 0.5, "start": 0.5}  # they take turns
    began = time.monotonic()
    other = Worker(("dice_py.stages.score", "dice_py.scoring.scorer"))
    other.submit(_nothing, log=Path("/dev/null"), name="calibration")
    ended: list[float] = []

    def watch() -> None:
        while not (other.started or other.ended):
            other.receive(0.05)
        ended.append(time.monotonic() - began)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    done = 0.0
    try:
        while not ended:
            started = time.monotonic() - began
            took = work()
            # Of the last one, only the part before the other's end.
            done += min(1.0, (ended[0] - started) / took) if ended else 1.0
    finally:
        watcher.join()
        other.stop()
    return {"work": min(1.0, done * alone / ended[0]), "seconds": ended[0]}
