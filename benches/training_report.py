"""The results of training.py: how far the losses may be from one another, the figures, and the table."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table
from shapes import machine

from dice_py.training.step0 import Step0

TRAINING = ("stock", "ours", "ours_checkpoint")
WAYS = (*TRAINING, "score")
SPANS = ("startup", "tokenize", "reference", "check", "training", "save")
GAMMA = 0.5
"""The default share of replayed pairs in a run."""
FLOAT32_TOLERANCE = 1e-4
"""Of a step's loss in float32. The ways were seen to differ by 2.0e-6 (the tiny shape, results/training.json)."""


def loss_tolerance(options: argparse.Namespace, step0: Iterable[dict[str, Any]]) -> float | None:
    """How far rounding may move a step's loss from that of another way.

    In a 16-bit dtype it follows from the spread that our ways measured before their first step, on the model and pairs
    of this bench: what it makes of a mean over the pairs of the smallest step (`Step0.loss_limit`).

    Args:
        options: of training.py.
        step0: what our ways measured, as dicts of `Step0`.

    Returns:
        None if nothing was measured.
    """
    if options.tolerance is not None:
        return float(options.tolerance)
    if options.dtype == "float32":
        return FLOAT32_TOLERANCE
    smallest = options.pairs % options.batch_size or options.batch_size
    return max((Step0(**measured)._replace(pairs=smallest).loss_limit() for measured in step0), default=None)


def compare(runs: dict[str, list[dict[str, Any]]]) -> float:
    """The largest difference of a step's loss from that of the first stock run."""
    expected = runs["stock"][0]["losses"]
    curves = [run["losses"] for way in TRAINING for run in runs[way]]
    if not expected or any(len(curve) != len(expected) for curve in curves):
        counts = sorted({len(curve) for curve in curves})
        raise SystemExit(f"every way must log the same number of losses, and at least one; they logged {counts}")
    return max(abs(a - b) for curve in curves for a, b in zip(curve, expected, strict=True))


def summarize(
    runs: dict[str, list[dict[str, Any]]],
    lengths: dict[str, Any],
    parity: dict[str, Any],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """The content of training.json."""

    def median(way: str, name: str) -> float:
        return statistics.median(run[name] for run in runs[way])

    ways: dict[str, Any] = {
        way: {
            "wall_seconds": median(way, "wall_seconds"),
            "peak_memory_bytes": int(median(way, "peak_memory_bytes")),
            "peak_before_bytes": int(median(way, "peak_before_bytes")),
            "seconds": {span: statistics.median(run["seconds"][span] for run in runs[way]) for span in SPANS},
            "runs": [{"wall_seconds": run["wall_seconds"], "seconds": run["seconds"]} for run in runs[way]],
        }
        for way in WAYS
    }
    work = {way: ways[way]["wall_seconds"] - ways[way]["seconds"]["startup"] for way in WAYS}
    shares = {"ours": 0.0, f"ours, {GAMMA:.0%} replayed": GAMMA, "ours, all replayed": 1.0}
    extra = ways["score"]["seconds"]["reference"]
    return {
        "shape": "smoke" if options.smoke else options.shape,
        "device": options.device,
        "dtype": options.dtype,
        "lora": options.lora,
        "pairs": options.pairs,
        "batch_size": options.batch_size,
        "per_device_train_batch_size": options.per_device_train_batch_size,
        "lengths": lengths,
        "steps": len(runs["stock"][0]["losses"]),
        "repeats": options.repeats,
        "threads": options.threads,
        "ways": ways,
        # From this run's own figures. `work` excludes the start of the process, its imports and loading the model.
        "speedup_over_stock": {
            name: {
                "wall": ways["stock"]["wall_seconds"] / (ways["ours"]["wall_seconds"] + share * extra),
                "work": work["stock"] / (work["ours"] + share * extra),
            }
            for name, share in shares.items()
        },
        "same_work": ways["stock"]["seconds"]["training"] / ways["ours"]["seconds"]["training"],
        "peak_memory_over_stock": {
            way: ways[way]["peak_memory_bytes"] / ways["stock"]["peak_memory_bytes"] for way in TRAINING
        },
        "parity": parity | {"losses": runs["stock"][0]["losses"]},
        "machine": machine(),
    }


def show(results: dict[str, Any], console: Console) -> None:
    """Prints the table."""
    title = f"one epoch of {results['pairs']} pairs, {results['shape']}, {results['device']} {results['dtype']}"
    table = Table(title=title)
    for name in ("way", *SPANS, "wall, s", "peak, GB"):
        table.add_column(name, justify="left" if name == "way" else "right")
    for way, row in results["ways"].items():
        spans = [f"{row['seconds'][span]:.2f}" for span in SPANS]
        table.add_row(way, *spans, f"{row['wall_seconds']:.2f}", f"{row['peak_memory_bytes'] / 1e9:.2f}")
    console.print(table)
    for name, ratio in results["speedup_over_stock"].items():
        console.print(f"{name}: {ratio['wall']:.2f} × as fast as stock, {ratio['work']:.2f} × without start-up")
    console.print(f"training, the same work in both: stock {results['same_work']:.2f} × as long as ours")
    parity = results["parity"]
    console.print(
        f"largest difference of a step's loss: {parity['max_loss_difference']:.2g} (allowed {parity['tolerance']:.2g})"
    )
