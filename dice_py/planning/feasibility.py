"""Whether a planned run fits into memory and disk, and the first stage that would fail."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dice_py.stages.registry import REGISTRY

_SETTINGS = {
    "generate": "generate.token_budget",
    "score": "score.token_budget",
    "mine": "data.prompts_per_round",
    "replay": "score.token_budget",
    "train": "train.per_device_train_batch_size",
    "evaluate": "generate.token_budget",
}


@dataclass(frozen=True)
class Room:
    """Free bytes: on the run folder's disk, and of the memory that holds the models."""

    disk: int
    memory: int
    memory_name: str
    """"GPU memory" or "memory"."""


def _gib(count: float) -> str:
    return f"{count / 2**30:,.2f} GiB"


def first_failure(stages: Mapping[str, dict[str, Any]], room: Room) -> dict[str, Any] | None:
    """The first check that fails, or None.

    Args:
        stages: in order of work, by name ("round-01/generate"): `peak_memory_bytes`, `disk_bytes`, which stay, and
            `transient_disk_bytes`, further bytes while it works. A stage that lacks something other than
            memory and disk has `lacking`: `setting`, `needed`, `available`, `text`, `remedy`.

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
        needed = 0 if kind == "mine" and room.memory_name == "GPU memory" else stage["peak_memory_bytes"]
        if needed > room.memory:
            return {
                "stage": name,
                "what": "memory",
                "setting": "generate.vllm.gpu_memory_utilization" if stage.get("engine") == "vllm" else _SETTINGS[kind],
                "needed": needed,
                "available": room.memory,
                "text": f"{name} needs {_gib(needed)} of {room.memory_name}, and {_gib(room.memory)} are free",
                "remedy": REGISTRY[kind].remedy or "lower data.prompts_per_round or mine.pool_rounds",
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
                "text": f"up to {name} the run needs {_gib(needed)} of disk, and {_gib(room.disk)} are free",
                "remedy": "free some space, put the run on a larger disk (--run-dir)"
                + (", or set train.save_steps=null" if saves else ", or lower rounds"),
            }
        written += stage["disk_bytes"]
    return None


def peak_disk(stages: Mapping[str, dict[str, Any]]) -> int:
    """The most bytes that the run folder holds at any time."""
    written = peak = 0
    for stage in stages.values():
        peak = max(peak, written + stage["disk_bytes"] + stage["transient_disk_bytes"])
        written += stage["disk_bytes"]
    return peak
