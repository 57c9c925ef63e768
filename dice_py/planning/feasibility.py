"""Whether a planned run fits into memory and disk, and the first stage that would fail."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dice_py.models.memory import gib, shortage_text
from dice_py.stages.registry import REGISTRY

_SETTINGS = {
    "generate": "generate.token_budget",
    "score": "score.token_budget",
    "mine": "data.prompts_per_round",
    "replay": "score.token_budget",
    "inspect": "report.token_credit",
    "train": "train.lora",
    "reinforce": "train.lora",
    "extrapolate": "generate.token_budget",
    "evaluate": "generate.token_budget",
}


@dataclass(frozen=True)
class Room:
    """Free bytes: on the run folder's disk, and of the memory that holds the models."""

    disk: int
    memory: int
    memory_name: str
    """"GPU memory" or "memory"."""


def first_failure(stages: Mapping[str, dict[str, Any]], room: Room) -> dict[str, Any] | None:
    """The first check that fails, or None.

    Args:
        stages: in order of work, by name ("round-01/generate"): `peak_memory_bytes`, `disk_bytes`, which stay, and
            `transient_disk_bytes`, further bytes while it works. A stage that lacks something other than
            memory and disk has `lacking`: `setting`, `needed`, `available`, `text`, `remedy`. A stage that can do with
            less memory than its peak has `least_memory_bytes`, and `remedy`, a function of the memory that is free.
            One that ends a round may have `freed_disk_bytes`.

    Returns:
        `stage`, `what` ("memory", "disk" or "data"), `setting`, `needed`, `available` (bytes; for "data" a count),
        `text` and `remedy`.
    """
    written = 0
    for name, stage in stages.items():
        kind = name.rpartition("/")[2]
        if stage.get("lacking"):
            return {"stage": name, "what": "data", **stage["lacking"]}
        # Mining needs no model: its memory is the host's, also where the models are on a GPU.
        needed = stage.get("least_memory_bytes", stage["peak_memory_bytes"])
        if kind == "mine" and room.memory_name == "GPU memory":
            needed = 0
        if needed > room.memory:
            remedy = REGISTRY[kind].remedy or "lower data.prompts_per_round or mine.pool_rounds"
            return {
                "stage": name,
                "what": "memory",
                "setting": "generate.vllm.gpu_memory_utilization" if stage.get("engine") == "vllm" else _SETTINGS[kind],
                "needed": needed,
                "available": room.memory,
                "text": shortage_text(name, needed, room.memory, room.memory_name),
                "remedy": stage["remedy"](room.memory) if "remedy" in stage else remedy,
            }
        needed = written + stage["disk_bytes"] + stage["transient_disk_bytes"]
        if needed > room.disk:
            saves = bool(stage["transient_disk_bytes"])
            return {
                "stage": name,
                "what": "disk",
                "setting": "train.save_steps" if saves else "rounds",
                "needed": needed,
                "available": room.disk,
                "text": f"up to {name} the run needs {gib(needed)} of disk, and {gib(room.disk)} are free",
                "remedy": "free some space, put the run on a larger disk (--run-dir)"
                + (", or set train.save_steps=null" if saves else ", or lower rounds")
                + ("" if name.startswith("round-01/") else ", or keep fewer models (rounds.keep_models=1)"),
            }
        written += stage["disk_bytes"] - stage.get("freed_disk_bytes", 0)
    return None


def peak_disk(stages: Mapping[str, dict[str, Any]]) -> int:
    """The most bytes that the run folder holds at any time."""
    written = peak = 0
    for stage in stages.values():
        peak = max(peak, written + stage["disk_bytes"] + stage["transient_disk_bytes"])
        written += stage["disk_bytes"] - stage.get("freed_disk_bytes", 0)
    return peak
