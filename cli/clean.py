"""`dice clean`: free the space of what a run need not keep."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import Json
from cli.output import print_json
from cli.terminal import say
from dice_py.errors import UsageError

if TYPE_CHECKING:
    from dice_py.config.rounds import KeepModels


def clean(
    folder: Annotated[Path, typer.Argument(help="A run folder.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    keep_models: Annotated[
        str | None,
        typer.Option(help="all, best, or a number of last rounds; default: the run's rounds.keep_models.", metavar="N"),
    ] = None,
    keep_samples: Annotated[
        bool | None,
        typer.Option(
            "--keep-samples/--no-samples", help="Generations and scores; default: the run's rounds.keep_samples."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Free the space of what a run need not keep.

    Old models and samples by the run's settings or the options, checkpoints of finished trainings, and what killed
    processes left. What a resume still needs stays. It asks nothing.
    """
    from cli.tables import size
    from dice_py.runs.keeping import clean as clean_run

    found = clean_run(folder, models=_models(keep_models), samples=keep_samples, dry_run=dry_run)
    if as_json:
        print_json(found)
        return
    for item in found["removed"]:
        say(f"{item['kind']:<13}{size(item['bytes']):>9}  {item['place']}")
    if found["kept"] is not None:
        say(found["kept"])
    parts = ", ".join(f"{kind} {size(count)}" for kind, count in found["bytes"].items())
    say(f"{'would free' if dry_run else 'freed'} {size(found['freed'])} ({parts})")


def _models(text: str | None) -> KeepModels | None:
    if text in (None, "all", "best"):
        return text  # type: ignore[return-value]
    if text.isdecimal() and int(text):
        return int(text)
    raise UsageError(f"--keep-models {text}: give all, best, or the number of rounds whose models are kept, from 1")
