"""The results of `real.py` (the contents of real.json) as a table and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
from matplotlib import pyplot as plt

INK, OURS, OTHER = "#222222", "#1f5fa8", "#b8b8b8"


def show(result: dict[str, Any], console: Console) -> None:
    """Prints the table: a line for each ratio."""
    table = Table(title=f"{result['model']}: seconds", box=None)
    for name in ("", "dice", "beside", "ratio"):
        table.add_column(name, justify="left" if not name else "right")
    generation, scoring, training, plan = (result[name] for name in ("generation", "scoring", "training", "plan"))
    best, default = (training[f"trl_{name}_seconds"] for name in ("best", "default"))
    rows = [
        ("generation, over vLLM", generation["seconds"], generation["vllm_seconds"], generation["time_over_vllm"]),
        ("scoring, TRL over", scoring["seconds"], scoring["trl_seconds"], scoring["speedup_over_trl"]),
        ("training, TRL's best over", training["seconds"], best, training["speedup_over_trl_best"]),
        ("training, TRL's default over", training["seconds"], default, training["speedup_over_trl_default"]),
        ("a run, planned over taken", plan["taken_seconds"], plan["planned_seconds"], plan["planned_over_taken"]),
    ]
    for name, ours, other, ratio in rows:
        table.add_row(name, f"{ours:.1f}", f"{other:.1f}", f"{ratio:.2f}")
    console.print(table)
    allocator = Table(title="with the allocator's settings, and with glibc's own", box=None)
    for name in ("", "seconds", "glibc", "system", "glibc", "peak GB", "glibc"):
        allocator.add_column(name, justify="left" if not name else "right")
    for name, part in result["allocator"].items():
        costs = ("seconds", "system_seconds", "peak_gb")
        allocator.add_row(name, *(f"{part[of][cost]:.1f}" for cost in costs for of in ("set", "glibc")))
    console.print(allocator)
    console.print(
        f"training: {training['share_of_matrix_rate']:.2f} of the matrix rate, peak {training['peak_gb']:.1f} GB "
        f"(TRL {training['trl_best_peak_gb']:.1f}); planning took {plan['seconds']:.0f} s",
        highlight=False,
    )


def draw(result: dict[str, Any], path: Path) -> None:
    """A bar of seconds for each way, part by part."""
    generation, scoring, training = (result[name] for name in ("generation", "scoring", "training"))
    parts = {
        "sampling": {"dice, transformers engine": generation["seconds"], "vLLM": generation["vllm_seconds"]},
        "scoring": {"dice": scoring["seconds"], "TRL's precompute": scoring["trl_seconds"]},
        "training": {
            "dice": training["seconds"],
            f"TRL, batch {training['trl_best_batch']}, its best": training["trl_best_seconds"],
            "TRL, batch 8, its default": training["trl_default_seconds"],
        },
    }
    figure, axes = plt.subplots(figsize=(9, 3.6), dpi=160, layout="constrained")
    labels, at = [], 0.0
    for part, ways in parts.items():
        for way, seconds in ways.items():
            axes.barh(at, seconds, color=OURS if way.startswith("dice") else OTHER, height=0.8)
            axes.text(seconds, at, f" {seconds:.1f} s", va="center", fontsize=9, color=INK)
            labels.append((at, f"{part}: {way}"))
            at += 1
        at += 0.6
    axes.set_yticks([place for place, _ in labels], [label for _, label in labels], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    machine = result["machine"]
    axes.set_title(f"{result['model']}: {machine['cpu']}, {machine['cores']} cores", loc="left", fontsize=11, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    plt.close(figure)
