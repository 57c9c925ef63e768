"""`dice plan`: what a run would cost. `dice run --dry-run` is the same."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.stages import Config, Json, Set, overrides, print_json

if TYPE_CHECKING:
    from dice_py.config.run import RunConfig

RunPolicy = Annotated[str | None, typer.Option(help="π_1, a DPO-tuned model: folder or Hugging Face id.")]
RunReference = Annotated[str | None, typer.Option(help="The model that its DPO training started from.")]
Prompts = Annotated[Path | None, typer.Option(help="Prompts: JSONL, JSON or Parquet.")]
Replay = Annotated[Path | None, typer.Option(help="Offline pairs in TRL's format.")]
Rounds = Annotated[int | None, typer.Option(help="Rounds of generate, score, mine, replay, train.")]
Seed = Annotated[int | None, typer.Option(help="The run's seed.")]
RunDir = Annotated[Path | None, typer.Option(help="The run folder; default: a new one under runs/.")]

DEFAULT_RUNS = Path("runs")


def run_config(
    config: list[Path] | None,
    assign: list[str] | None,
    policy: str | None,
    reference: str | None,
    prompts: Path | None,
    replay: Path | None,
    rounds: int | None,
    seed: int | None,
) -> RunConfig:
    """The resolved config of `dice run` and `dice plan`."""
    from dice_py.config.loading import resolve

    return resolve(
        config or [],
        assign or [],
        overrides(
            model__policy=policy,
            model__reference=reference,
            data__prompts=None if prompts is None else str(prompts),
            data__replay=None if replay is None else str(replay),
            rounds=rounds,
            seed=seed,
        ),
    )


def show_plan(resolved: RunConfig, folder: Path, fresh: bool, as_json: bool) -> None:
    """Plans a run in `folder`, and prints it."""
    from cli.progress import Display
    from dice_py.planning.plan import plan as make_plan

    own_start = time.process_time()  # importing, which is one thread's work; of `dice run` it is as much
    with Display() as display:
        found = make_plan(resolved, folder, fresh=fresh, own_start=own_start, report=display)
    if as_json:
        print_json(found)
        return
    from cli.tables import plan_lines, plan_table, print_table

    print_table(plan_table(found))
    for line in plan_lines(found):
        typer.echo(line)


def plan(
    config: Config = None,
    assign: Set = None,
    policy: RunPolicy = None,
    reference: RunReference = None,
    prompts: Prompts = None,
    replay: Replay = None,
    rounds: Rounds = None,
    seed: Seed = None,
    run_dir: RunDir = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure anew, even where figures are remembered.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a run would cost, and whether it fits.

    Time, GPU hours, disk and memory of each stage: from a short calibration, or from figures remembered of the same
    model shape on the same device.
    """
    resolved = run_config(config, assign, policy, reference, prompts, replay, rounds, seed)
    show_plan(resolved, run_dir or DEFAULT_RUNS, fresh, as_json)
