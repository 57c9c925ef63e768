"""The state of a run folder: its stages, counts and times. Nothing is changed, and torch is not imported."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dice_py.errors import DataError, DiceError, UsageError
from dice_py.runs.best import new_policy, stored_outcome
from dice_py.runs.folder import check_plain, is_running, stage_names
from dice_py.runs.profile import profile
from dice_py.runs.progress import read_progress
from dice_py.runs.removal import removed_list
from dice_py.runs.stored_config import CONFIG_FILE, has_config, stored_config
from dice_py.storage.files import Manifest


def run_status(folder: Path) -> dict[str, Any]:
    """The state of a run: `run`, `state`, `stages` and `done` (counts of stages), and `entries` in order of work.

    `policy` is the new policy of a finished run, else None, and `ended_after` the round that ended the run before the
    rounds that its config asks for (runs/best.py), else None.

    `state` is "running" while a process works in the folder, "finished" when every stage is done, else "stopped"
    (`dice resume` continues it). An entry has `stage`, `status`, `seconds` and `counts`, and `started` (seconds since
    the epoch) and `key`, None before it begins. `progress` is that of the running stage, None if there is none
    (runs/progress.py). `removed` is what was removed to free its space (runs/removal.py).

    Raises:
        UsageError: the folder holds no run.
        DataError: its manifest is damaged.
    """
    if not (folder / CONFIG_FILE).is_file() and not has_config(folder):
        raise UsageError(f"{folder} holds no run (no {CONFIG_FILE}); `dice status` lists those under runs/")
    check_plain(folder, links=True)
    config, _ = stored_config(folder)
    manifest = Manifest(folder / "manifest.json")
    if manifest.is_damaged:
        raise DataError(
            f"{manifest.path} is damaged: it is not as it was written. `dice resume {folder}` makes it again"
        )
    running = is_running(folder)
    entries = []
    outcome = stored_outcome(manifest.data)
    ended_after = None if outcome is None else outcome.ended_after
    for name in stage_names(config, ended_after):
        entry = manifest.stage(name) or {}
        status = entry.get("status", "to do")
        if status == "running" and not running:
            status = "stopped"
        entries.append(
            {"stage": name, "status": status, "seconds": entry.get("seconds"), "counts": entry.get("counts", {})}
            | {"started": entry.get("started"), "key": entry.get("key")}
        )
    at_work = next((entry["stage"] for entry in entries if entry["status"] == "running"), None)
    progress = None if at_work is None else read_progress(folder, at_work)
    done = sum(entry["status"] == "done" for entry in entries)
    state = "running" if running else "finished" if done == len(entries) else "stopped"
    return {
        "run": str(folder),
        "state": state,
        "stages": len(entries),
        "done": done,
        "policy": str(new_policy(folder, manifest.data, config)) if state == "finished" else None,
        "ended_after": ended_after,
        "removed": removed_list(folder),
        "progress": None if progress is None else progress.values(),
        "entries": entries,
    }


def kept_policy(folder: Path) -> Path:
    """The new policy of a finished run: the last round's, or with rounds.keep=best the best round's."""
    return new_policy(folder, Manifest(folder / "manifest.json").data, stored_config(folder)[0])


def run_profile(folder: Path) -> dict[str, Any]:
    """Where the time of a run went, up to now: `run` and `state` as in `run_status`, and the values of `profile`.

    Raises:
        UsageError: the folder holds no run.
    """
    status = run_status(folder)
    return {"run": status["run"], "state": status["state"], **profile(folder)}


def list_runs(runs: Path) -> list[dict[str, Any]]:
    """The state of every run under `runs`, without entries, by name; "unreadable" where it cannot be read."""
    statuses = []
    if runs.is_dir():
        os.scandir(runs).close()  # glob finds nothing in a folder that may not be read
    for config in sorted(runs.glob("*/config.yaml")):
        try:
            status = run_status(config.parent)
        except (DiceError, OSError):  # one broken folder must not hide the others
            status = {"run": str(config.parent), "state": "unreadable", "stages": 0, "done": 0}
        statuses.append(
            {name: value for name, value in status.items() if name not in ("entries", "progress", "removed")}
        )
    return statuses
