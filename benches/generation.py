"""Sampling K responses per prompt, ours against plain transformers and vLLM: `make bench-generation`, or `--help`.

A model with random weights (shapes.py) responds to prompts of random tokens with log-normal lengths. A random model
rarely ends a response, so one in `--mean-response` tokens of the vocabulary, drawn from the seed, is a stop token for
every way. Lengths are then geometric with that mean; the longest of a thousand is about seven times as long. The bench
needs no network.

Each way runs in a process of its own on the same files. It is timed from a loaded and warm model to the last response
(ours: to the last shard's file). Ours must sample the same tokens as the plain way with the same seeds. In float32 on a
CPU, a mismatch means status 1 and no results. Elsewhere mismatches are counted in the results, since kernels sum in an
order that depends on the batch. The sums of log-probabilities are compared with a float32 forward over one response at
a time. Results: a table, and generation.json in `--out`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from generation_ways import RUN, Way, check
from rich.console import Console
from rich.table import Table
from shapes import SHAPES, long_tailed_lengths, machine, write_model

from dice_py.config.stages import GenerateConfig
from dice_py.generation.shard import write_prompts
from dice_py.storage.files import write_json

WAYS = {
    "transformers": "dice, transformers: shared prefill, rows join",
    "hf_generate": "transformers' generate, K full prompts",
    "vllm_streaming": "dice, vLLM: shards overlap",
    "vllm_shard_by_shard": "dice, vLLM: shard by shard",
    "vllm_no_prefix_caching": "dice, vLLM: no prefix caching",
    "vllm_separate": "vLLM, all requests at once",
    "vllm_n": "vLLM, LLM.generate with n=K",
}
SAME_TOKENS = {
    "transformers": "hf_generate",
    "vllm_streaming": "vllm_separate",
    "vllm_shard_by_shard": "vllm_separate",
    "vllm_no_prefix_caching": "vllm_separate",
}
"""Pairs of ways with the same random numbers. vLLM's differ from ours, and n=K has other seeds."""
SPEEDUPS = {
    "speedup_over_hf_generate": ("transformers", "hf_generate"),
    "speedup_of_streaming_over_shard_by_shard": ("vllm_streaming", "vllm_shard_by_shard"),
    "speedup_of_prefix_caching": ("vllm_streaming", "vllm_no_prefix_caching"),
    "speedup_over_vllm_n": ("vllm_streaming", "vllm_n"),
    "speedup_of_separate_over_n": ("vllm_separate", "vllm_n"),
    "speedup_of_vllm_over_transformers": ("vllm_streaming", "transformers"),
}
ON_CPU = {
    "prompts": 24,
    "prompt_median": 128,
    "mean_response": 32,
    "max_new_tokens": 128,
    "shard_prompts": 8,
    "max_num_seqs": 32,
    "token_budget": 16384,
}
ON_GPU = {
    "prompts": 512,
    "prompt_median": 256,
    "mean_response": 256,
    "max_new_tokens": 2048,
    "shard_prompts": 128,
    "max_num_seqs": 256,
    "token_budget": 131072,
}
LONGEST_PROMPT = 4  # medians


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.child:
        print(json.dumps(child(json.loads(options.child))))
        return 0
    log = Console(stderr=True)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        task = prepare(options, Path(folder))
        measured: dict[str, dict[str, Any]] = {}
        for way in options.ways:
            reason = skipped(way)
            log.print(f"{WAYS[way]}" + (f": skipped, {reason}" if reason else ""))
            measured[way] = {"skipped": reason} if reason else in_child({**task, "way": way})
        log.print("one response at a time, in float32")
        differences = check(task, [way for way, figures in measured.items() if "skipped" not in figures])
        results = summarize(options, task, measured, differences)
    mismatches = {way: row["mismatches"] for way, row in results["ways"].items() if row.get("mismatches")}
    if mismatches and task["dtype"] == "float32" and task["device"] == "cpu":
        print(f"responses whose tokens differ from the plain way's: {mismatches}", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "generation.json", results)
    print_table(results)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare dice's generation with plain transformers and vLLM.")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--samples", type=int, default=16, help="K, responses per prompt")
    for name in ON_CPU:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    parser.add_argument("--checked", type=int, default=64, help="responses of each way to score one at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ways", default=",".join(WAYS), help="separated by commas")
    parser.add_argument("--out", type=Path, default=Path("benches/results"))
    parser.add_argument(
        "--work", type=Path, help="folder for the model; default: the system's folder for temporary files"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.ways = options.ways.split(",")
    if unknown := set(options.ways) - set(WAYS):
        parser.error(f"--ways: {', '.join(sorted(unknown))} unknown; choose from {', '.join(WAYS)}")
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    for name, value in (ON_CPU if options.device == "cpu" else ON_GPU).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def skipped(way: str) -> str | None:
    if way.startswith("vllm") and importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    return None


def prepare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Writes model, tokenizer and prompts; returns the task of the processes, as JSON values."""
    vocabulary = write_model(folder / "model", options.shape, options.dtype, options.device, options.seed)
    random = np.random.default_rng(options.seed)
    lengths = long_tailed_lengths(
        options.prompts,
        median=options.prompt_median,
        sigma=0.6,
        low=2,
        high=LONGEST_PROMPT * options.prompt_median,
        seed=options.seed,
    )
    prompts = [(at, [1, *random.integers(3, vocabulary, length - 1).tolist()]) for at, length in enumerate(lengths)]
    size = options.shard_prompts
    shards = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    write_prompts(folder / "prompts.parquet", shards)
    stops = random.choice(np.arange(3, vocabulary), max(1, vocabulary // options.mean_response), replace=False)
    config = GenerateConfig.model_validate(
        {
            "samples": options.samples,
            "temperature": 1.0,
            "max_new_tokens": options.max_new_tokens,
            "shard_prompts": size,
            "token_budget": options.token_budget,
            "vllm": {"max_num_seqs": options.max_num_seqs},
        }
    )
    return {
        "folder": str(folder),
        "device": options.device,
        "dtype": options.dtype,
        "seed": options.seed,
        "shards": len(shards),
        "longest": int(lengths.max()),
        "stops": sorted(stops.tolist()),
        "checked": options.checked,
        "config": config.model_dump(),
    }


# --- a way, in a process of its own ---------------------------------------------------------------------------


def in_child(task: dict[str, Any]) -> Any:
    command = [sys.executable, __file__, "--child", json.dumps(task)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"the process for {task['way']} ended with status {done.returncode}; its error is above")
    return json.loads(done.stdout.splitlines()[-1])


def child(task: dict[str, Any]) -> Any:
    # Standard output is for the result alone; libraries print to it too.
    stdout, devnull = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    try:
        way = Way(task)
        seconds = RUN[way.name](way)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "title": WAYS[way.name],
            "seconds": seconds,
            "tokens": way.tokens(),
            "tokens_per_second": way.tokens() / seconds,
            "peak_memory_bytes": memory,
            "peak_gpu_memory_bytes": torch.cuda.max_memory_reserved() if way.models.device == "cuda" else None,
        }
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)


# --- results --------------------------------------------------------------------------------------------------


def summarize(
    options: argparse.Namespace,
    task: dict[str, Any],
    measured: dict[str, dict[str, Any]],
    differences: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """The content of generation.json."""
    folder = Path(task["folder"])
    ways: dict[str, dict[str, Any]] = {}
    for way, figures in measured.items():
        ways[way] = dict(figures)
        if way in differences:
            ways[way]["max_abs_difference"] = differences[way]["max"]
            ways[way]["mean_abs_difference"] = differences[way]["mean"]
        plain = SAME_TOKENS.get(way)
        if plain in differences and way in differences:
            mine, others = (pl.read_parquet(folder / f"{name}.parquet")["token_ids"].to_list() for name in (way, plain))
            ways[way]["mismatches"] = sum(one != other for one, other in zip(mine, others, strict=True))
    speedups = {
        name: ways[fast]["tokens_per_second"] / ways[slow]["tokens_per_second"]
        for name, (fast, slow) in SPEEDUPS.items()
        if all("tokens_per_second" in ways.get(way, {}) for way in (fast, slow))
    }
    responses = [pl.read_parquet(folder / f"{way}.parquet")["token_ids"].list.len() for way in differences]
    return {
        "machine": machine(),
        "parameters": {
            **{name: getattr(options, name) for name in ("shape", "device", "dtype", "samples", "seed", "checked")},
            **{name: getattr(options, name) for name in ON_CPU},
            "shape_dimensions": SHAPES[options.shape],
            "longest_prompt": task["longest"],
            "response_tokens": {
                "mean": float(responses[0].mean()),  # type: ignore[arg-type]
                "longest": int(responses[0].max()),  # type: ignore[arg-type]
            }
            if responses
            else None,
        },
        "ways": ways,
        **speedups,
        "max_abs_difference": max((difference["max"] for difference in differences.values()), default=None),
    }


def print_table(results: dict[str, Any]) -> None:
    table = Table("way", "seconds", "tokens/s", "peak memory", "mismatches", "largest |Δ Σ log π|")
    for way, row in results["ways"].items():
        if "skipped" in row:
            table.add_row(WAYS[way], f"skipped: {row['skipped']}")
            continue
        gpu = row["peak_gpu_memory_bytes"]
        memory = f"{row['peak_memory_bytes'] / 1e9:.2f} GB" + (f", GPU {gpu / 1e9:.2f} GB" if gpu else "")
        table.add_row(
            row["title"],
            f"{row['seconds']:.2f}",
            f"{row['tokens_per_second']:.0f}",
            memory,
            str(row.get("mismatches", "")),
            f"{row['max_abs_difference']:.1e}",
        )
    console = Console(width=max(Console().width, 130))
    console.print(table)
    for name in SPEEDUPS:
        if name in results:
            console.print(f"{name.replace('_', ' ')}: {results[name]:.2f} ×")


if __name__ == "__main__":
    sys.exit(main())
