"""Sampling: the ways of benches/generation.py without vLLM, and what the seeded draw costs in a step."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from gpu.context import Check, PeakMemory, free_memory, log, seconds_of

TINY = {"prompts": 4, "samples": 4, "prompt-median": 16, "mean-response": 8, "max-new-tokens": 16, "checked": 4}
SMALL = {"prompts": 32, "samples": 16, "prompt-median": 128, "mean-response": 64, "max-new-tokens": 256, "checked": 32}
SIZES = {"shard-prompts": 16, "token-budget": 65536}
WAYS = ("transformers", "hf_generate")


def generation(check: Check) -> None:
    """Each way on one small model in this process; then log-probabilities against a float32 forward."""
    import generation as bench
    from generation_ways import RUN, Way
    from generation_ways import check as compare

    sizes = SIZES | (TINY if check.cpu else SMALL)
    given = [item for name, value in sizes.items() for item in (f"--{name}", str(value))]
    options = bench.parse(["--shape", check.small, "--device", check.device, "--ways", ",".join(WAYS), *given])
    figures, peak = check.figures, PeakMemory(check.cpu)
    figures |= {"shape": check.small, "dtype": options.dtype, "sizes": sizes, "ways": {}}
    with tempfile.TemporaryDirectory(dir=check.work) as folder:
        task = bench.prepare(options, Path(folder))
        free_memory(check.cpu)
        for name in WAYS:
            way = Way({**task, "way": name})
            peak.start()
            seconds = RUN[name](way)
            tokens = way.tokens()
            figures["ways"][name] = {
                "seconds": round(seconds, 3),
                "tokens": tokens,
                "tokens_per_second": round(tokens / seconds, 1),
                "peak_gb": peak.gb(),
            }
            log(f"{name}: {figures['ways'][name]}")
            free_memory(check.cpu)
            check.save()
        abs_diffs = compare(task, list(WAYS))
        for name, values in abs_diffs.items():
            figures["ways"][name]["abs_difference"] = values
        figures["mismatches"] = mismatches(Path(task["folder"]))
    ours, plain = (figures["ways"][name]["tokens_per_second"] for name in WAYS)
    figures["speedup_over_generate"] = round(ours / plain, 3)


def mismatches(folder: Path) -> int:
    """Responses whose tokens differ between the ways, which have the same random numbers."""
    import polars as pl

    ours, plain = (pl.read_parquet(folder / f"{name}.parquet")["token_ids"].to_list() for name in WAYS)
    return sum(one != other for one, other in zip(ours, plain, strict=True))


def draw(check: Check) -> None:
    """Milliseconds of a step's draw, by rows and temperature; and of the random numbers that NumPy makes for it."""
    import torch

    from dice_py.config.stages import GenerateConfig
    from dice_py.generation.engines.decoding import SeededSampling

    device, vocabulary = torch.device(check.device), 512 if check.cpu else 128256
    for rows in (8,) if check.cpu else (64, 512):
        for temperature in (1.0, 0.7):
            sampling = SeededSampling(list(range(rows)), GenerateConfig(temperature=temperature), [2], device)
            scores = torch.randn(rows, vocabulary, device=device).mul_(3).to(torch.bfloat16)
            ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
            seconds = seconds_of(lambda s=sampling, i=ids, x=scores: s.draw(i, x), 20, check.cpu)  # type: ignore[misc]
            check.figures[f"{rows} rows, temperature {temperature}"] = {
                "step_ms": round(1e3 * seconds, 3),
                "microseconds_per_token": round(1e6 * seconds / rows, 3),
                "host_ms": _host_milliseconds(sampling, vocabulary),
            }


def _host_milliseconds(sampling: Any, vocabulary: int) -> float | None:
    """Milliseconds of NumPy's random numbers for one step; None where the draw has none on the host."""
    import numpy as np

    from dice_py.generation.engines.decoding import BLOCK

    generators = getattr(sampling, "draws", None)
    if not isinstance(generators, list) or not all(isinstance(one, np.random.Generator) for one in generators):
        return None
    count = -(-vocabulary // BLOCK) + BLOCK
    began = time.perf_counter()
    for _ in range(5):
        np.stack([one.random(count) for one in generators])
    return round(1e3 * (time.perf_counter() - began) / 5, 3)
