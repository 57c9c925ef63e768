"""`dice plan`: the cost of a run. `dice run --dry-run` does the same."""

from __future__ import annotations

import time
from collections.abc import Callable
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
from dice_py.errors import UsageError
from dice_py.planning.machine import FILESYSTEM, NETWORK, Cluster

if TYPE_CHECKING:
    from dice_py.config.run import RunConfig


def show_plan(
    resolved: RunConfig, folder: Path, fresh: bool, as_json: bool, on_paper: Callable[[int], Cluster] | None = None
) -> None:
    """Plans a run in `folder`, or on a cluster that it may have, and prints it."""
    from cli.progress import Display
    from dice_py.planning.plan import plan as make_plan

    own_start = time.process_time()  # of imports, in one thread; `dice run` takes as long
    with Display() as display:
        estimate = make_plan(resolved, folder, fresh=fresh, own_start=own_start, on_paper=on_paper, report=display)
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
    nodes: Annotated[
        int | None,
        typer.Option(min=1, help="Plan for a cluster of so many nodes with devices as here; it need not be there."),
    ] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=0, help="GPUs of each of the --nodes. Default: as many as are visible here.")
    ] = None,
    network: Annotated[
        float, typer.Option(min=0.001, help="GB/s between a node of the --nodes and the others.")
    ] = NETWORK,
    filesystem: Annotated[
        float, typer.Option(min=0.001, help="GB/s of the file system of the --nodes, for all of them together.")
    ] = FILESYSTEM,
    as_json: Json = False,
) -> None:
    """Show what a run would cost, and whether it fits.

    Time, GPU hours, disk and memory of each stage: from a short calibration, or from stored measurements of the same
    model shape on the same device. For a cluster (devices.executor=ray, or --nodes) also what is idle.
    """
    resolved = run_config(config, assign, policy, reference, sft, prompts, replay, rounds, method, seed, generations)
    if nodes is None and gpus_per_node is not None:
        raise UsageError("--gpus-per-node is about the nodes of a cluster: name their number with --nodes")
    on_paper: Callable[[int], Cluster] | None = None
    if nodes is not None:

        def on_paper(gpus: int) -> Cluster:
            return Cluster(nodes, gpus if gpus_per_node is None else gpus_per_node, network, filesystem)

    show_plan(resolved, run_dir or DEFAULT_RUNS, fresh, as_json, on_paper)
