"""What the parts of the GPU check share: where they work, their figures, inputs, and small measurements."""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Check:
    """One part that runs, and its figures so far."""

    name: str
    repo: Path
    """The project's tree that is tested."""
    work: Path
    """A folder for files that are removed in the end."""
    out: Path
    """The folder of the results."""
    cpu: bool
    """A dry run on a CPU, in tiny shapes."""
    figures: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    notes: list[str] = field(default_factory=list)
    """What the code under test reported: a path that falls back, memory that ran out."""

    @property
    def device(self) -> str:
        return "cpu" if self.cpu else "cuda"

    @property
    def small(self) -> str:
        """The shape (benches/shapes.py) of the parts on a small model."""
        return "tiny" if self.cpu else "llama3-1b"

    @property
    def large(self) -> str:
        """The shape of the parts on a large model."""
        return "tiny" if self.cpu else "llama3-8b"

    @property
    def shared_memory(self) -> Path:
        """A folder in shared memory for large models; whoever started the part removes it in any case."""
        return Path("/dev/shm") / self.work.name

    @property
    def file(self) -> Path:
        """The part's figures: read by the process that started it."""
        return self.work / "figures" / f"{self.name}.json"

    def save(self) -> None:
        """Writes the figures, so that a part that is stopped keeps those that it has."""
        content = {"figures": self.figures, "error": self.error, "notes": list(dict.fromkeys(self.notes))}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_suffix(".new")
        temporary.write_text(json.dumps(content, default=str), encoding="utf-8")
        os.replace(temporary, self.file)  # noqa: PTH105

    def report(self, event: str, **fields: Any) -> None:
        """A callback for the project's stages: keeps their notes."""
        if event == "note":
            self.notes.append(str(fields["text"]))
            log(f"note: {fields['text']}")


class PartError(Exception):
    """A part has figures, and they show a fault."""


def log(text: str) -> None:
    print(text, flush=True)


def first_line(error: BaseException) -> str:
    """The error's type and the first line of its text."""
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text}"[:300]


def synchronized(cpu: bool) -> float:
    """Seconds on a monotonic clock, once the GPU has done all work."""
    import torch

    if not cpu:
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(work: Callable[[], Any], repeats: int, cpu: bool) -> float:
    """Mean seconds of one call, after one call that is not counted."""
    work()
    began = synchronized(cpu)
    for _ in range(repeats):
        work()
    return (synchronized(cpu) - began) / repeats


def free_memory(cpu: bool) -> None:
    """Drops what nothing refers to, on the GPU too."""
    import torch

    gc.collect()
    if not cpu:
        torch.cuda.empty_cache()


class PeakMemory:
    """The peak of what torch allocated on the GPU, though the code under test resets torch's own peak."""

    def __init__(self, cpu: bool) -> None:
        import torch

        self._cpu, self._seen = cpu, 0
        self._reset = torch.cuda.reset_peak_memory_stats
        if not cpu:
            torch.cuda.reset_peak_memory_stats = self._keep_and_reset  # type: ignore[assignment]

    def _keep_and_reset(self, *arguments: Any) -> None:
        import torch

        self._seen = max(self._seen, torch.cuda.max_memory_allocated())
        self._reset(*arguments)

    def start(self) -> None:
        self._seen = 0
        if not self._cpu:
            self._reset()

    def gb(self) -> float | None:
        """10⁹ bytes since `start`; None without a GPU."""
        import torch

        return None if self._cpu else round(max(self._seen, torch.cuda.max_memory_allocated()) / 1e9, 2)


def draw_sequences(
    prompts: int, samples: int, longest: int, vocabulary: int, scale: float = 1.0
) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and responses of random tokens, each prompt `samples` times in a row, as benches/scoring.py draws them.

    Args:
        scale: of the medians, which are 200 tokens of a prompt and 300 of a response.
    """
    import numpy as np
    from shapes import long_tailed_lengths

    rng = np.random.default_rng(0)
    before = long_tailed_lengths(prompts, median=200 * scale, sigma=0.6, low=8, high=longest, seed=0)
    after = long_tailed_lengths(prompts * samples, median=300 * scale, sigma=0.8, low=2, high=longest, seed=1)
    heads = [rng.integers(3, vocabulary, length).tolist() for length in before]
    tails = [rng.integers(3, vocabulary, length).tolist() for length in after]
    return [head for head in heads for _ in range(samples)], tails


def differences(
    sums: Sequence[float], expected: Sequence[float], responses: Sequence[Sequence[int]]
) -> dict[str, float]:
    """How far sums of log-probabilities are from those expected, in nats.

    Returns:
        `max` and `mean` of the absolute differences; `per_root_token`, the mean of each divided by the root of its
        number of tokens (one token's rounding, if tokens were independent); `bias_per_token`, which has a sign.
    """
    pairs = list(zip(sums, expected, responses, strict=True))
    return {
        "max": round(max(abs(a - b) for a, b, _ in pairs), 6),
        "mean": round(statistics.mean(abs(a - b) for a, b, _ in pairs), 6),
        "per_root_token": round(statistics.mean(abs(a - b) / len(r) ** 0.5 for a, b, r in pairs), 6),
        "bias_per_token": round(statistics.mean((a - b) / len(r) for a, b, r in pairs), 8),
    }
