"""`report.html`: one page of a run, or of several side by side. It opens from disk, and can be mailed.

The page needs no network and no other file. Its plots are static; the only script is that of the pair browser.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from dice_py.errors import UsageError
from dice_py.reporting.charts import SERIES, cannot_draw, unchecked
from dice_py.reporting.pair_data import SCRIPTS, STYLES, pair_data
from dice_py.reporting.render import render_page
from dice_py.reporting.sections.configuration import configuration, settings_that_differ
from dice_py.reporting.sections.evaluation import evaluation
from dice_py.reporting.sections.mining import mined_rounds, mining_round
from dice_py.reporting.sections.overview import overview
from dice_py.reporting.sections.training import training
from dice_py.reporting.stored_run import StoredRun, read_run
from dice_py.reporting.views import NOT_OURS
from dice_py.storage.digests import DIGEST_NAME
from dice_py.storage.files import write_sealed_text

REPORT = "report.html"
MOST_RUNS = len(SERIES)
_SEAL = "<!-- {} -->"
_SEALED = re.compile(rf"<!-- {re.escape(DIGEST_NAME)}: [0-9a-f]{{32}} -->\n?\Z")


def write_report(folder: Path) -> Path:
    """Writes `report.html` into a run folder, with the pairs to read; returns its path."""
    return write_comparison([folder], folder / REPORT)


def write_comparison(folders: Sequence[Path], out: Path, *, with_pairs: bool = True) -> Path:
    """Writes the page of one run, or of several that are compared; returns its path.

    What is absent or damaged is named on the page, and is no error.

    Args:
        out: the page, which is replaced.
        with_pairs: whether the page has the pairs to read; without them it stays below 3 MB.

    Raises:
        UsageError: more runs than a plot can tell apart.
    """
    if len(folders) > MOST_RUNS:
        raise UsageError(f"{len(folders)} runs are more than a plot can tell apart: compare at most {MOST_RUNS}")
    runs = [read_run(folder, name) for folder, name in zip(folders, run_names(folders), strict=True)]
    write_sealed_text(out, report_page(runs, with_pairs=with_pairs), _SEAL)
    return out


def is_report(path: Path) -> bool:
    """Whether a file is a page that dice wrote: it ends with its digest in a comment."""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - 200))
        return _SEALED.search(file.read().decode(errors="replace")) is not None


def run_names(folders: Sequence[Path]) -> list[str]:
    """How the page calls the runs: by the names of their folders, or by the paths where names are equal."""
    names = [folder.absolute().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def report_page(runs: list[StoredRun], *, with_pairs: bool) -> str:
    """The HTML of the page."""
    why_not = cannot_draw()
    draws = why_not is None
    problems: list[str] = [] if why_not is None else [why_not]

    def made(what: str, make: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return make(*arguments, **options)
        except NOT_OURS:
            problems.append(f"{what} cannot be shown, since a file of it is not as dice writes it")
            return None

    nothing: dict[str, Any] = {"figures": [], "tables": [], "notes": [], "note": ""}
    with unchecked() if draws else nullcontext():
        evaluated = made("the evaluation", evaluation, runs, draws=draws) or nothing
        trained = made("the training", training, runs, draws=draws) or nothing
        mined = [
            made(f"the mining of {name} (mining.json, distributions.json)", mining_round, runs, name, draws=draws)
            for name in mined_rounds(runs)
        ]
    configured = [made(f"the configuration of {run.name}", configuration, run) for run in runs]
    differing = settings_that_differ(runs) if len(runs) > 1 else None
    pairs = made("the pairs to read", _pairs, runs) if with_pairs else None
    # Last: reading the pairs adds to the problems of the runs.
    views = [made(f"the overview of {run.name}", overview, run) for run in runs]
    names = [run.name for run in runs]
    title = f"DICE run {names[0]}" if len(runs) == 1 else f"DICE runs {', '.join(names)}"
    return render_page(
        "report.html.j2",
        title=title,
        styles=[*(STYLES if pairs else ["style.css"]), "report.css"],
        scripts=SCRIPTS if pairs else [],
        runs=[view for view in views if view is not None],
        problems=list(dict.fromkeys(problems)),
        evaluation=evaluated,
        mining=[each for each in mined if each is not None],
        training=trained,
        configuration=[each for each in configured if each is not None],
        differing=differing,
        pairs=pairs,
        pairs_note="" if pairs else _without_pairs(with_pairs),
    )


def _pairs(runs: list[StoredRun]) -> dict[str, Any] | None:
    """What the pair browser shows; None where no run has pairs to read."""
    frames = {run.name: frame for run in runs if (frame := run.pairs()) is not None and frame.height}
    if not frames:
        return None
    return pair_data(frames)


def _without_pairs(with_pairs: bool) -> str:
    if not with_pairs:
        return "The pairs were left out (--no-pairs)."
    return "There are no pairs to read: report.pairs is 0, or no round has come to its stage inspect."
