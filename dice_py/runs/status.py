"""What a run folder says of itself: stages, counts and times. Neither imports torch nor touches anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dice_py.config.loading import load_resolved
from dice_py.errors import DiceError, UsageError
from dice_py.runs.folder import is_running
from dice_py.runs.profile import profile
from dice_py.stages.registry import ROUND_STAGES as STAGES
from dice_py.storage.files import Manifest


def run_status(folder: Path) -> dict[str, Any]:
    """`run`, `state`, `stages` (in all), `done`, and `entries` in order of work.

    `state` is "running" while a process works in the folder, "finished" when every stage is done, else
    "stopped" (`dice resume` goes on).

    Raises:
        UsageError: the folder holds no run.
    """
    if not (folder / "config.yaml").is_file():
        raise UsageError(f"{folder} holds no run (no config.yaml)")
    config = load_resolved(folder / "config.yaml")
    manifest = Manifest(folder / "manifest.json")
    running = is_running(folder)
    entries = []
    for number in range(1, config.rounds + 1):
        for stage in STAGES:
            name = f"round-{number:02d}/{stage}"
            entry = manifest.stage(name) or {}
            status = entry.get("status", "to do")
            if status == "running" and not running:
                status = "stopped"
            entries.append(
                {
                    "stage": name,
                    "status": status,
                    "seconds": entry.get("seconds"),
                    "counts": entry.get("counts", {}),
                }
            )
    done = sum(entry["status"] == "done" for entry in entries)
    state = "running" if running else "finished" if done == len(entries) else "stopped"
    return {"run": str(folder), "state": state, "stages": len(entries), "done": done, "entries": entries}


def run_profile(folder: Path) -> dict[str, Any]:
    """Where the time of a run went, up to now: `run`, `state` as `run_status` has it, and what `profile` found.

    Raises:
        UsageError: the folder holds no run.
    """
    status = run_status(folder)
    return {"run": status["run"], "state": status["state"], **profile(folder)}


def list_runs(runs: Path) -> list[dict[str, Any]]:
    """The status of every run under `runs`, without its entries, by name; "unreadable" where it has none."""
    found = []
    for config in sorted(runs.glob("*/config.yaml")):
        try:
            status = run_status(config.parent)
        except DiceError:  # one broken folder must not hide the others
            status = {"run": str(config.parent), "state": "unreadable", "stages": 0, "done": 0}
        found.append({name: value for name, value in status.items() if name != "entries"})
    return found
