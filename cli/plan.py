"""`dice plan`: the cost of a run. `dice run --dry-run` does the same."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import (
    DEFAULT_RUNS,
    Config,
    Generations,
    Json,
    Method,
    Prompts,
    Replay,
    Rounds,
    RunDir,
    RunPolicy,
    RunReference,
    Seed,
    Set,
    Sft,
    run_config,
)
from cli.output import print_json
from cli.terminal import say

if TYPE_CHECKING:
    from dice_py.config.run import RunConfig


def show_plan(resolved: RunConfig, folder: Path, fresh: bool, as_json: bool) -> None:
    """Plans a run in `folder`, and prints it."""
    from cli.progress import Display
    from dice_py.planning.plan import plan as make_plan

    own_start = time.process_time()  # of imports, in one thread; `dice run` takes as long
    with Display() as display:
        estimate = make_plan(resolved, folder, fresh=fresh, own_start=own_start, report=display)
    if as_json:
        print_json(estimate)
        return
    from cli.tables import plan_lines, plan_table, print_table

    print_table(plan_table(estimate))
    for line in plan_lines(estimate):
        say(line)


def plan(
    config: Config = None,
    assign: Set = None,
    policy: RunPolicy = None,
    reference: RunReference = None,
    sft: Sft = None,
    prompts: Prompts = None,
    replay: Replay = None,
    generations: Generations = None,
    rounds: Rounds = None,
    method: Method = None,
    seed: Seed = None,
    run_dir: RunDir = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again, even where measurements are stored.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a run would cost, and whether it fits.

    Time, GPU hours, disk and memory of each stage: from a short calibration, or from stored measurements of the same
    model shape on the same device.
    """
    resolved = run_config(config, assign, policy, reference, sft, prompts, replay, rounds, method, seed, generations)
    show_plan(resolved, run_dir or DEFAULT_RUNS, fresh, as_json)
