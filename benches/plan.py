"""The plan of the embedded default against a run of it: `make bench-plan` (`benches/plan.py --help`).

Three commands, each in a process and a folder of its own: a plan with a fresh calibration; `dice run` of the same
rounds, timed from outside; and a plan from the costs that this run kept. The synthetic world comes from the user's
cache and is made before anything is timed. Prints planned and true seconds of each stage, and writes results/plan.json.

    planned_over_true_total     ratio of the two totals: `fresh` (from the calibration), `stored` (from the run)
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dice_py.storage.files import Manifest, write_json

HERE = Path(__file__).resolve().parent


def dice(arguments: list[str], folder: Path, cache: Path) -> tuple[str, float]:
    """Runs `dice …` in `folder`; returns its stdout and its seconds."""
    environment = os.environ | {"DICE_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parent)}
    began = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-m", "cli.main", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.monotonic() - began
    if ended.returncode:
        raise SystemExit(f"dice {' '.join(arguments)} failed:\n{ended.stderr[-3000:]}")
    return ended.stdout, seconds


def own_cache(folder: Path, world: Path) -> Path:
    """A cache without costs, linked to the worlds of the user's cache."""
    folder.mkdir()
    (folder / "world").symlink_to(world, target_is_directory=True)
    return folder


def compare(fresh: dict[str, Any], stored: dict[str, Any], run: Path, seconds: float) -> dict[str, Any]:
    """Ratios of planned to true seconds, for a run folder whose run took `seconds` in total."""
    entries = Manifest(run / "manifest.json").data["stages"]
    stages = {}
    for name, entry in entries.items():
        planned = {"fresh": fresh["stages"][name]["seconds"], "stored": stored["stages"][name]["seconds"]}
        stages[name] = {
            "true_seconds": entry["seconds"],
            **{f"{of}_seconds": value for of, value in planned.items()},
            **{f"{of}_over_true": value / entry["seconds"] for of, value in planned.items()},
        }
    totals = {"fresh": fresh["total_seconds"], "stored": stored["total_seconds"]}
    return {
        "true_total_seconds": seconds,
        "planned_total_seconds": totals,
        "planned_over_true_total": {of: value / seconds for of, value in totals.items()},
        "stages": stages,
    }


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Plans, runs, and plans again."""
    from dice_py.storage.cache import cache_folder

    options = [f"--rounds={args.rounds}", *(f"--set={one}" for one in args.set)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        users = cache_folder()
        worlds = (users / "world").resolve()
        console.print("[dim]the synthetic world[/dim]")
        dice(["world", *(f"--set={one}" for one in args.set)], folder, users)
        planning, running = (own_cache(folder / name, worlds) for name in ("planning", "running"))
        console.print("[dim]a plan with a calibration[/dim]")
        fresh, took = dice(["plan", "--fresh", "--json", *options], folder, planning)
        console.print("[dim]the run[/dim]")
        _, seconds = dice(["run", "--run-dir=run", "--json", *options], folder, running)
        keep_costs(folder / "run", running)
        console.print("[dim]a plan from the costs that the run kept[/dim]")
        stored, stored_took = dice(["plan", "--json", *options], folder, running)
        plans = json.loads(fresh), json.loads(stored)
        if [plan["calibration"]["source"] for plan in plans] != ["measured", "stored"]:
            raise SystemExit("the second plan did not use the costs that the run should have kept")
        result = compare(*plans, folder / "run", seconds)
    return result | {"plan_seconds": {"fresh": took, "stored": stored_took}, "rounds": args.rounds}


def keep_costs(run: Path, cache: Path) -> None:
    """Keeps the run's costs, where the run itself has not done so."""
    code = (
        f"from pathlib import Path; from dice_py.runs.throughput import remember_run; remember_run(Path({str(run)!r}))"
    )
    environment = os.environ | {"DICE_CACHE": str(cache), "PYTHONPATH": str(HERE.parent)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def show(result: dict[str, Any], console: Console) -> None:
    """Prints the table."""
    table = Table(title=f"embedded default, {result['rounds']} rounds: seconds", box=None)
    for name in ("", "true", "planned, calibrated", "over true", "planned, from the run", "over true"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for name, stage in result["stages"].items():
        values = (stage[part] for part in ("fresh_seconds", "fresh_over_true", "stored_seconds", "stored_over_true"))
        table.add_row(name, f"{stage['true_seconds']:.2f}", *(f"{value:.2f}" for value in values))
    planned, ratio = result["planned_total_seconds"], result["planned_over_true_total"]
    table.add_row(
        "total, with the start of the command",
        f"{result['true_total_seconds']:.2f}",
        *(f"{of[name]:.2f}" for name in ("fresh", "stored") for of in (planned, ratio)),
    )
    console.print(table)
    took = result["plan_seconds"]
    console.print(
        f"planning took {took['fresh']:.1f} s with a calibration, {took['stored']:.1f} s without", highlight=False
    )


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], help="a config value, as for dice run")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args(arguments)
    console = Console(width=max(Console().width, 130))
    result = measure(args, console)
    sys.path.insert(0, str(HERE))
    from shapes import machine

    result["machine"] = machine()
    show(result, console)
    write_json(args.out / "plan.json", result)
    console.print(f"written to {args.out}/plan.json")


if __name__ == "__main__":
    main()
