"""Scoring against TRL's precompute and the DICE authors' way: `make bench-scoring` (`benches/scoring.py --help`).

The model has random weights in a named shape (shapes.py). Each prompt has K responses, and lengths have a long tail.
The ways of scoring (scoring_ways.py) alternate within each repeat, so that noise of the machine affects them alike.
With the tiny model each runs in a new process, and so has a peak of memory to itself. A large model is made once, and
all ways run in one process. Every sum is compared with a float32 forward of one
sequence at a time; a larger difference than rounding ends the bench with status 1. Prints a table and writes
results/scoring.json (tiny) or results/scoring-SHAPE.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dice_py.storage.files import write_json

HERE = Path(__file__).resolve().parent
DEFAULTS: dict[str, dict[str, Any]] = {
    "tiny": {"prompts": 8, "samples": 16, "prompt_median": 100, "response_median": 60, "longest": 1500},
    "llama3-8b": {"prompts": 64, "samples": 16, "prompt_median": 200, "response_median": 300, "longest": 2048},
    "zephyr-7b": {"prompts": 64, "samples": 16, "prompt_median": 200, "response_median": 300, "longest": 2048},
}
REFERENCE = "one_at_a_time"
"""The way that the sums of all others are compared with."""
FLOAT32_TOLERANCE = 2e-6
"""Bounds the difference of two float32 sums, relative to the sum's absolute value plus its number of tokens."""


def draw_sequences(args: argparse.Namespace, vocabulary: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and responses of random tokens, each prompt `samples` times in a row."""
    from shapes import long_tailed_lengths

    rng = np.random.default_rng(args.seed)
    lengths = long_tailed_lengths(
        args.prompts, median=args.prompt_median, sigma=0.6, low=8, high=args.longest, seed=args.seed
    )
    answers = long_tailed_lengths(
        args.prompts * args.samples,
        median=args.response_median,
        sigma=0.8,
        low=2,
        high=args.longest,
        seed=args.seed + 1,
    )
    prompts = [rng.integers(3, vocabulary, length).tolist() for length in lengths]
    prompts = [prompt for prompt in prompts for _ in range(args.samples)]
    return prompts, [rng.integers(3, vocabulary, length).tolist() for length in answers]


def measure(args: argparse.Namespace, ways: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Runs the ways `--repeats` times in this process, with one model; by way, what each repeat measured.

    `one_at_a_time` comes last and runs once: it needs the weights in float32.
    """
    import torch
    from shapes import make_model

    from dice_py.models.flops import matmul_rate

    model = make_model(args.shape, getattr(torch, args.dtype), args.device, args.seed)
    prompts, responses = draw_sequences(args, model.config.vocab_size)
    rate = matmul_rate(torch.device(args.device), model.dtype)
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for _ in range(args.repeats):
        for way in ways:
            if way != REFERENCE:
                runs[way].append(measure_once(model, way, prompts, responses) | {"matmul_flops_per_second": rate})
    if REFERENCE in ways:
        model = model.float()  # exactly the weights that the other ways have in `dtype`
        runs[REFERENCE].append(measure_once(model, REFERENCE, prompts, responses))
    return runs


def measure_once(model: Any, way: str, prompts: list[list[int]], responses: list[list[int]]) -> dict[str, Any]:
    """Seconds, sums and peak memory of one way."""
    import torch
    from scoring_ways import WAYS

    from dice_py.compute.memory import forget_peak, peak_memory, resident_memory

    # A warm-up, so that threads and kernels made at the first call are not counted.
    WAYS[way][1](model, prompts[:2], responses[:2])
    on_gpu = model.device.type == "cuda"
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    forget_peak(model.device)
    before = torch.cuda.memory_allocated() if on_gpu else resident_memory("VmRSS")
    outcome = WAYS[way][1](model, prompts, responses)
    peak = peak_memory()
    return {
        "seconds": outcome.seconds,
        "sums": outcome.sums,
        "peak_memory_bytes": peak,
        "peak_memory_beyond_model_bytes": max(peak - before, 0),
        **outcome.extra,
    }


def measure_in_subprocess(
    args: argparse.Namespace, ways: Sequence[str], repeats: int
) -> dict[str, list[dict[str, Any]]]:
    """Runs `measure` in a new process."""
    given = vars(args) | {"repeats": repeats, "measured": ",".join(ways)}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if name != "out"]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.run(
            [sys.executable, __file__, *options],
            env=os.environ | {"HF_DATASETS_CACHE": folder, "HF_HUB_OFFLINE": "1", "DICE_CACHE": folder},
            capture_output=True,
            text=True,
            check=False,
        )
    if process.returncode:
        raise SystemExit(f"{', '.join(ways)} failed:\n{process.stderr[-3000:]}")
    result: dict[str, list[dict[str, Any]]] = json.loads(process.stdout.strip().splitlines()[-1])
    return result


def run_ways(args: argparse.Namespace, console: Console) -> dict[str, list[dict[str, Any]]]:
    """By way, what each repeat measured: a process for each of the tiny model, one for all of a large model."""
    from scoring_ways import WAYS

    if args.shape != "tiny":
        console.print(f"[dim]{args.repeats} repeats of all ways, in one process[/dim]", highlight=False)
        return measure_in_subprocess(args, list(WAYS), args.repeats)
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for repeat in range(args.repeats):
        for way in WAYS:
            console.print(f"[dim]{way}, {repeat + 1} of {args.repeats}[/dim]", highlight=False)
            runs[way] += measure_in_subprocess(args, [way], 1)[way]
    return runs


def compare(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Runs all ways and returns the content of the results file."""
    from scoring_ways import WAYS
    from shapes import SHAPES, machine

    prompts, responses = draw_sequences(args, SHAPES[args.shape]["vocab_size"])
    lengths = np.array([len(response) for response in responses])
    runs = run_ways(args, console)
    expected = np.array(runs[REFERENCE][0]["sums"])
    ways: dict[str, dict[str, Any]] = {}
    for way, repeats in runs.items():
        abs_diff = np.abs(np.array(repeats[0]["sums"]) - expected)
        ways[way] = {
            "what": WAYS[way][0],
            "seconds": statistics.median(run["seconds"] for run in repeats),
            "all_seconds": [run["seconds"] for run in repeats],
            "max_abs_difference": float(abs_diff.max()),
            "mean_abs_difference": float(abs_diff.mean()),
            "worst_relative_difference": float((abs_diff / (np.abs(expected) + lengths)).max()),
            "peak_memory_bytes": max(run["peak_memory_bytes"] for run in repeats),
            "peak_memory_beyond_model_bytes": max(run["peak_memory_beyond_model_bytes"] for run in repeats),
        }
    ours, seconds = runs["ours"], ways["ours"]["seconds"]
    rate = statistics.median(run["matmul_flops_per_second"] for run in ours)
    return {
        "shape": args.shape,
        "dtype": args.dtype,
        "device": args.device,
        "machine": machine(),
        "prompts": args.prompts,
        "samples": args.samples,
        "prompt_tokens": {"median": float(np.median([len(p) for p in prompts])), "sum": sum(map(len, prompts))},
        "response_tokens": {"median": float(np.median(lengths)), "max": int(lengths.max()), "sum": int(lengths.sum())},
        "repeats": args.repeats,
        # TRL at the faster of its batch sizes.
        "speedup_over_trl_precompute": min(ways[way]["seconds"] for way in ways if way.startswith("trl")) / seconds,
        "speedup_over_reference_way": ways["authors"]["seconds"] / seconds,
        "speedup_over_padded_rows": ways["ours_padded"]["seconds"] / seconds,
        "speedup_over_key_value_cache": ways["key_value_cache"]["seconds"] / seconds,
        "max_abs_difference": ways["ours"]["max_abs_difference"],
        "tokens": ours[0]["tokens"],
        "unshared_tokens": ours[0]["unshared_tokens"],
        "flops": ours[0]["flops"],
        "flops_per_second": ours[0]["flops"] / seconds,
        "matmul_flops_per_second": rate,
        "share_of_matmul_rate": ours[0]["flops"] / seconds / rate,
        "token_budget": ours[0]["token_budget"],
        "ways": ways,
    }


def show(results: dict[str, Any], console: Console) -> None:
    """Prints the table."""
    table = Table(
        title=f"{results['shape']}, {results['dtype']}: {results['prompts']} × {results['samples']} responses", box=None
    )
    for name in ("", "seconds", "ours is faster by", "peak memory", "beyond the model", "largest difference"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for way in results["ways"].values():
        table.add_row(
            way["what"],
            f"{way['seconds']:.2f}",
            f"{way['seconds'] / results['ways']['ours']['seconds']:.2f}",
            f"{way['peak_memory_bytes'] / 2**30:.2f} GiB",
            f"{way['peak_memory_beyond_model_bytes'] / 2**30:.2f} GiB",
            f"{way['max_abs_difference']:.2g}",
        )
    console.print(table)
    console.print(
        f"ours: {results['flops_per_second'] / 1e9:,.0f} GFLOP/s, "
        f"{100 * results['share_of_matmul_rate']:.0f} % of a plain matrix product's "
        f"{results['matmul_flops_per_second'] / 1e9:,.0f}; {results['tokens']:,} tokens instead of "
        f"{results['unshared_tokens']:,}",
        highlight=False,
    )


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(DEFAULTS), default="tiny")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default=None, help="float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--samples", type=int, help="responses of each prompt; even")
    parser.add_argument("--prompt-median", type=float, help="tokens")
    parser.add_argument("--response-median", type=float, help="tokens")
    parser.add_argument("--longest", type=int, help="largest number of tokens of a prompt or response")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--measured", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name, value in DEFAULTS[args.shape].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    if args.measured:
        print(json.dumps(measure(args, args.measured.split(","))))
        return
    console = Console(width=max(Console().width, 130))
    results = compare(args, console)
    show(results, console)
    if args.dtype == "float32":
        off = {
            name: way
            for name, way in results["ways"].items()
            if not way["worst_relative_difference"] <= FLOAT32_TOLERANCE
        }
        if off:
            raise SystemExit(f"sums differ from the float32 forward by more than rounding: {', '.join(off)}")
    name = "scoring" if args.shape == "tiny" else f"scoring-{args.shape}"
    write_json(args.out / f"{name}.json", results)
    console.print(f"written to {args.out / name}.json")


if __name__ == "__main__":
    main()
