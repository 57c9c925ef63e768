"""Whether a planned run fits, and the first thing that would fail: checks in the order of the work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dice_py.stages.registry import REGISTRY

_SETTINGS = {
    "generate": "generate.token_budget",
    "score": "score.token_budget",
    "replay": "score.token_budget",
    "train": "train.per_device_train_batch_size",
    "evaluate": "generate.token_budget",
}


@dataclass(frozen=True)
class Room:
    """What there is: bytes free on the run folder's disk, and of the memory that models are held in."""

    disk: int
    memory: int
    place: str
    """Names the memory: "GPU memory" or "memory"."""


def _gib(count: float) -> str:
    return f"{count / 2**30:,.2f} GiB"


def first_failure(stages: Mapping[str, dict[str, Any]], room: Room) -> dict[str, Any] | None:
    """The first check that fails, or None.

    Args:
        stages: in order of work, by name ("round-01/generate"): `peak_memory_bytes`, `disk_bytes`, which stay, and
            `transient_disk_bytes`, which it needs beside them while it works. A stage that lacks what no memory or
            disk can give has `lacking`: `setting`, `needed`, `available`, `text`, `remedy`.

    Returns:
        `stage`, `what` ("memory", "disk" or "data"), `setting`, `needed`, `available` (bytes; of data a count), `text`
        and `remedy`.
    """
    written = 0
    for name, stage in stages.items():
        kind = name.rpartition("/")[2]
        if stage.get("lacking"):
            return {"stage": name, "what": "data", **stage["lacking"]}
        needed = stage["peak_memory_bytes"]
        if needed > room.memory:
            return {
                "stage": name,
                "what": "memory",
                "setting": "generate.vllm.gpu_memory_utilization" if stage.get("engine") == "vllm" else _SETTINGS[kind],
                "needed": needed,
                "available": room.memory,
                "text": f"{name} needs {_gib(needed)} of {room.place}, and {_gib(room.memory)} are free",
                "remedy": REGISTRY[kind].remedy,
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
                "text": f"by {name} the run has {_gib(needed)} on the disk, and {_gib(room.disk)} are free",
                "remedy": "free some space, give --run-dir on a larger disk"
                + (", or set train.save_steps=null" if saves else ", or lower rounds"),
            }
        written += stage["disk_bytes"]
    return None


def peak_disk(stages: Mapping[str, dict[str, Any]]) -> int:
    """The most that the run folder holds at any time."""
    written = most = 0
    for stage in stages.values():
        most = max(most, written + stage["disk_bytes"] + stage["transient_disk_bytes"])
        written += stage["disk_bytes"]
    return most
