"""`dice report`: the page of one run, or of several runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import Json, Panels
from cli.output import print_json
from cli.terminal import say
from dice_py.errors import UsageError


class ReportCommand(Panels):
    """A command that writes one file, and reads run folders."""

    out_is_file = True
    may_be_folders = ("runs",)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; several are compared on one page.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The page; default: report.html in the run folder, of several runs here."),
    ] = None,
    no_pairs: Annotated[bool, typer.Option("--no-pairs", help="Leave out the pairs to read: under 3 MB.")] = False,
    as_json: Json = False,
) -> None:
    """Write the page of a run, report.html, or compare runs on one.

    The page opens from disk, without a network. A run writes it after each round. What is absent or damaged is named on
    the page. A file that is no page of dice is not replaced.
    """
    from dice_py.reporting.html import REPORT, is_report, write_comparison
    from dice_py.reporting.stored_run import check_run_folder

    for folder in runs:
        check_run_folder(folder)
    resolved = [folder.resolve() for folder in runs]
    if len(set(resolved)) < len(resolved):
        twice = next(folder for folder, path in zip(runs, resolved, strict=True) if resolved.count(path) > 1)
        raise UsageError(f"{twice} is given twice: name each run once")
    target = out or (runs[0] / REPORT if len(runs) == 1 else Path(REPORT))
    of_run = len(runs) == 1 and target.resolve() == resolved[0] / REPORT
    if target.is_file() and not of_run and not is_report(target):
        raise UsageError(f"{target} is there, and is no page of dice: it is not replaced. Name another file with --out")
    write_comparison(runs, target, with_pairs=not no_pairs)
    if as_json:
        print_json({"report": str(target), "runs": [str(folder) for folder in runs]})
        return
    say(f"report: {target}")
