"""`dice`: the loop, each of its stages alone, and what there is to see of them.

Heavy modules are imported inside the commands, so that `dice --help` answers at once. Results go to stdout
(one JSON object with --json), everything else to stderr. Exit codes: 0 done, 2 usage or config, 3 bad input
data, 4 out of memory, 5 interrupted and resumable, 1 a bug of ours.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cli import stages
from cli.mine import MineCommand, Panels, mine
from cli.plan import (
    DEFAULT_RUNS,
    Prompts,
    Replay,
    Rounds,
    RunDir,
    RunPolicy,
    RunReference,
    Seed,
    plan,
    run_config,
    show_plan,
)
from cli.stages import Config, Json, Set, print_json, print_result, work_apart
from dice_py.errors import DiceError, InterruptedRunError, UsageError


class _Commands(TyperGroup):
    """Turns what is not a bug into a `DiceError`, before Typer gives it an exit code of its own."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise InterruptedRunError("interrupted; the same command goes on from what is whole") from None
        except OSError as error:
            from dice_py.storage.files import path_error

            sentence = path_error(error)
            if sentence is None:
                raise
            raise sentence from None


app = typer.Typer(
    name="dice",
    cls=_Commands,
    rich_markup_mode=None,  # Rich would be imported for every --help, and takes longer than all the rest
    help="Self-alignment of language models with DPO implicit rewards (DICE).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunFolder = Annotated[Path, typer.Argument(help="A run folder.")]


@app.command()
def run(
    config: Config = None,
    assign: Set = None,
    policy: RunPolicy = None,
    reference: RunReference = None,
    prompts: Prompts = None,
    replay: Replay = None,
    rounds: Rounds = None,
    seed: Seed = None,
    run_dir: RunDir = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would cost: `dice plan`.")] = False,
    as_json: Json = False,
) -> None:
    """Run the loop: on your model, or on a small synthetic world.

    The world is made on first use, and taken when no model is named.
    """
    resolved = run_config(config, assign, policy, reference, prompts, replay, rounds, seed)
    if dry_run:
        show_plan(resolved, run_dir or DEFAULT_RUNS, False, as_json)
        return
    from cli.display import Display
    from dice_py.runs.folder import new_run_folder
    from dice_py.runs.loop import run as run_rounds

    folder = run_dir or new_run_folder(DEFAULT_RUNS)
    with Display() as display:
        display.line(f"run folder: {folder}")
        metrics = run_rounds(resolved, folder, display)
    _finish(folder, metrics, as_json)


@app.command()
def resume(folder: RunFolder, as_json: Json = False) -> None:
    """Go on with a run that was stopped.

    Nothing that is whole is made again, and nothing whose inputs changed is used again.
    """
    from cli.display import Display
    from dice_py.runs.loop import resume as resume_rounds

    with Display() as display:
        metrics = resume_rounds(folder, display)
    _finish(folder, metrics, as_json)


def _finish(folder: Path, metrics: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json({"run": str(folder), "metrics": metrics})
        return
    from cli.display import metrics_table, print_table

    print_table(metrics_table(metrics))
    last = list(metrics)[-1]
    typer.echo(f"new policy: {folder / last / 'train' / 'model'}\nreport:     {folder / 'report.html'}")


@app.command()
def status(
    folder: Annotated[Path | None, typer.Argument(help="A run folder; default: all runs under runs/.")] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Where its time went: stages, start-up of processes, idle GPUs.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show the stages of a run, with their counts and times."""
    from dice_py.runs.status import list_runs, run_profile, run_status

    if folder is None:
        if profile:
            raise UsageError("--profile is of one run: name its folder (dice status RUN --profile)")
        runs = list_runs(DEFAULT_RUNS)
        if as_json:
            print_json(runs)
            return
        if not runs:
            typer.echo(f"no runs under {DEFAULT_RUNS}/")
        for found in runs:
            typer.echo(f"{found['run']}  {found['state']}  {found['done']}/{found['stages']} stages")
        return
    found = run_profile(folder) if profile else run_status(folder)
    if as_json:
        print_json(found)
        return
    from cli.display import print_table, profile_lines, profile_table, status_table

    if not profile:
        print_table(status_table(found))
        return
    if found["rounds"]:
        print_table(profile_table(found))
    for line in profile_lines(found):
        typer.echo(line)


app.command()(plan)
for stage, kind in (
    (stages.generate, Panels), (stages.score, Panels), (mine, MineCommand), (stages.replay, Panels),
    (stages.train, Panels), (stages.evaluate, Panels),
):  # fmt: skip
    app.command(cls=kind)(stage)


@app.command()
def world(config: Config = None, assign: Set = None, as_json: Json = False) -> None:
    """Make the synthetic world, or find it, and show what is in it."""
    from dice_py.config.loading import resolve
    from dice_py.storage.cache import cache_folder
    from dice_py.synthetic.world import World, find_world

    resolved = resolve(config or [], assign or []).world
    found = find_world(resolved)
    if found is None:
        found = World(
            Path(work_apart("world", "dice_py.stages.world:make_world", cache_folder() / "log", config=resolved))
        )
    print_result({"folder": str(found.folder), **found.info()}, as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show what is installed, which devices are here, what is missing."""
    from dice_py.doctor import examine

    found = examine()
    if as_json:
        print_json(found)
        return
    for name, version in found["packages"].items():
        typer.echo(f"{name:<14}{version or 'not installed'}")
    typer.echo(f"{'python':<14}{found['python']}")
    typer.echo(f"{'devices':<14}{', '.join(found['devices'])}")
    typer.echo(f"{'engine':<14}{found['engine'] or 'none'} ({found['engine_reason']})")
    typer.echo(f"{'cache':<14}{found['cache']}")
    for missing in found["missing"]:
        typer.echo(f"missing: {missing['what']}; add it with: {missing['command']}")
    if not found["missing"]:
        typer.echo("nothing is missing")


def main() -> None:
    """The console script: runs the application and turns errors into sentences and exit codes."""
    try:
        app(prog_name="dice")
    except DiceError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("error: interrupted", err=True)
        sys.exit(InterruptedRunError.exit_code)


if __name__ == "__main__":
    main()
