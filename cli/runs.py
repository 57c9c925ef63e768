"""The commands of a run: `dice run`, `dice resume`, `dice status`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli.options import (
    DEFAULT_RUNS,
    Config,
    Force,
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
from cli.output import pages, print_json
from cli.plan import show_plan
from cli.terminal import say
from dice_py.errors import DataError, UsageError


def run(
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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the cost, as `dice plan` does.")] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Run the loop: on your model, or on a small synthetic world.

    With an SFT model, round 0 first trains the policy by DPO on the offline pairs. The world is made on first use, and
    used when no model is named.
    """
    resolved = run_config(config, assign, policy, reference, sft, prompts, replay, rounds, method, seed, generations)
    if dry_run:
        show_plan(resolved, run_dir or DEFAULT_RUNS, False, as_json)
        return
    from cli.progress import Display
    from dice_py.reporting.tracking.session import Tracked
    from dice_py.runs.folder import new_run_folder
    from dice_py.runs.loop import run as run_rounds

    folder = run_dir or new_run_folder(DEFAULT_RUNS)
    with Display() as display, Tracked(folder, display) as report:
        display.line(f"run folder: {folder}")
        metrics = run_rounds(resolved, folder, report, after_round=pages(display), force=force)
    _finish(folder, metrics, as_json)


def resume(
    folder: Annotated[Path, typer.Argument(help="A run folder.")],
    assign: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="A changed setting: section.key=value.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Resume a stopped run, or go on with changed settings.

    Completed shards are kept. Nothing whose inputs changed is used again: with --set, the run goes on from the first
    stage that the setting touches. What is damaged is set aside and made again.
    """
    from cli.progress import Display
    from dice_py.reporting.tracking.session import Tracked
    from dice_py.runs.loop import resume as resume_rounds

    with Display() as display, Tracked(folder, display) as report:
        metrics = resume_rounds(folder, report, assignments=assign or [], after_round=pages(display), force=force)
    _finish(folder, metrics, as_json)


def _finish(folder: Path, metrics: dict[str, Any], as_json: bool) -> None:
    from dice_py.runs.status import kept_policy

    policy = kept_policy(folder)
    if as_json:
        print_json({"run": str(folder), "policy": str(policy), "metrics": metrics})
        return
    from cli.tables import metrics_table, print_table

    print_table(metrics_table(metrics))
    say(f"new policy: {policy}\nreport:     {folder / 'report.html'}")


def status(
    folder: Annotated[Path | None, typer.Argument(help="A run folder; default: all runs under runs/.")] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Where its time went: stages, start-up of processes, idle GPUs.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every artifact, and name those that are damaged or missing.")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Follow a run until it ends: rates, time left, loss, margins, warnings.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show the stages of a run, with their counts and times."""
    from dice_py.runs.status import run_profile, run_status

    chosen = [name for name, given in (("--profile", profile), ("--verify", verify), ("--watch", watch)) if given]
    if watch and (len(chosen) > 1 or as_json):
        other = "--json" if as_json else chosen[0]
        raise UsageError(f"--watch and {other} do not go together: --watch shows a run as it goes on; leave one out")
    if folder is None:
        if chosen:
            name = chosen[0]
            raise UsageError(f"{name} is of one run: name its folder (dice status RUN {name})")
        _list_runs(as_json)
        return
    if watch:
        from cli.watch import watch_run

        watch_run(folder)
        return
    if verify:
        _verify(folder, as_json)
        return
    values = run_profile(folder) if profile else run_status(folder)
    if as_json:
        print_json(values)
        return
    from cli.tables import print_table, profile_lines, profile_table, size, status_table

    if not profile:
        print_table(status_table(values))
        if values["progress"] is not None:
            from cli.progress import pace_text
            from dice_py.runs.progress import Progress

            at_work = dict(values["progress"])
            del at_work["seconds_left"]
            progress = Progress(**at_work)
            say(f"{progress.stage}: {pace_text(progress)}")
        if values["ended_after"] is not None:
            goes_on = f"dice resume {folder} --set rounds.stop_when=none"
            say(f"ended after round {values['ended_after']} (rounds.stop_when=worse); to go on: {goes_on}")
        if values["policy"] is not None:
            say(f"new policy: {values['policy']}")
        for item in values["removed"]:
            say(f"removed: {item['place']} ({size(item['bytes'])}, by {item['by']})")
        return
    if values["rounds"]:
        print_table(profile_table(values))
    for line in profile_lines(values):
        say(line)


def _verify(folder: Path, as_json: bool) -> None:
    """Prints the paths that are damaged, then those that are missing, each on a line of its own."""
    from dice_py.runs.verify import verify_run

    found = verify_run(folder)
    damaged, missing = found["damaged"], found["missing"]
    if as_json:
        print_json(found)
    else:
        for path in [*damaged, *missing]:
            say(path)
    if damaged or missing:
        adapters = sum(Path(path).parent.name == "adapter" for path in damaged)
        apart = f", but for the {adapters} of adapters: delete that round's train folder for these" if adapters else ""
        raise DataError(
            f"{len(damaged)} files of {folder} are damaged, and {len(missing)} are missing (the last ones named); "
            f"`dice resume {folder}` makes them again{apart}"
        )
    if not as_json:
        say(f"nothing is damaged: {found['files']} files ({found['bytes']:,} bytes) were read")
        for item in found["removed"]:
            say(f"removed by {item['by']}: {item['place']}")


def _list_runs(as_json: bool) -> None:
    from dice_py.runs.status import list_runs

    runs = list_runs(DEFAULT_RUNS)
    if as_json:
        print_json(runs)
        return
    if not runs:
        say(f"no runs under {DEFAULT_RUNS}/")
    for entry in runs:
        say(f"{entry['run']}  {entry['state']}  {entry['done']}/{entry['stages']} stages")
