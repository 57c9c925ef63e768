"""The page of an ablation: its claims with verdicts, its plots, and all of its numbers. It opens from disk.

The page has no script and needs no network. It links to the reports of the runs beside it, where they are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dice_py.errors import DataError
from dice_py.reporting.ablation_results import (
    checked,
    command,
    gap_texts,
    intervals_text,
    run_folder,
    shown_metrics,
    unfinished_runs,
)
from dice_py.reporting.charts import cannot_draw, unchecked
from dice_py.reporting.html import REPORT
from dice_py.reporting.render import render_page
from dice_py.reporting.sections import ablation_plots, ablation_tables
from dice_py.reporting.views import NOT_OURS
from dice_py.storage.digests import DIGEST_NAME, file_state
from dice_py.storage.files import write_sealed_text

_SEAL = "<!-- dice ablate, {} -->"
_SEALED = re.compile(rf"<!-- dice ablate, {re.escape(DIGEST_NAME)}: [0-9a-f]{{32}} -->\n\Z".encode())


def write_ablation_page(results: Mapping[str, Any], out: Path) -> Path:
    """Writes the page of an ablation, atomically, and returns its path. A file that is there is replaced.

    Args:
        results: the content of ablation.json.
        out: the page, in the ablation's folder: links lead to `runs/ARM/seed-N/report.html` beside it.

    Raises:
        DataError: the results are not as `dice ablate` writes them.
    """
    checked(results)
    try:
        page = _page(results, out)
    except NOT_OURS as error:
        raise DataError(
            f"the ablation of {out.parent} cannot be shown, since ablation.json is not as dice writes it "
            f"({type(error).__name__}: {error}): repeat `dice ablate` with the same --out, which makes it again"
        ) from error
    write_sealed_text(out, page, _SEAL)
    return out


def is_ablation_page(path: Path) -> bool:
    """Whether a file is a page of `write_ablation_page`, as it was written."""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - 200))
        return _SEALED.search(file.read()) is not None and file_state(path) == "intact"


def _page(results: Mapping[str, Any], out: Path) -> str:
    why_not = cannot_draw()
    draws = why_not is None
    _, absent = shown_metrics(results)
    problems = [] if why_not is None else [why_not.replace("dice report", "dice ablate")]
    problems += [f"{words}: no arm has it" for words in absent]
    problems += gap_texts(results)
    with unchecked() if draws else nullcontext():
        figures = ablation_plots.by_round(results) if draws else []
        frontier = ablation_plots.frontier(results) if draws else []
    if draws and not frontier:
        problems.append("the frontier: it needs the KL to the start (evaluate.kl_to_start) and a judge")
    claims, others = ablation_tables.claims_tables(results)
    return render_page(
        "ablation.html.j2",
        title=f"DICE ablation {out.absolute().parent.name}",
        styles=["style.css", "report.css", "ablation.css"],
        scripts=[],
        facts=ablation_tables.facts(results),
        unfinished=unfinished_runs(results),
        problems=problems,
        notes=results.get("notes", ()),
        arms=ablation_tables.arms_table(results),
        settings=ablation_tables.settings_table(results),
        command=command(results, out.parent),
        intervals=intervals_text(results),
        differences=ablation_tables.differences_text(results),
        claims=claims,
        other_claims=others,
        figures=figures,
        frontier=frontier,
        numbers=ablation_tables.numbers_table(results),
        details=[(arm["arm"], ablation_tables.arm_tables(arm)) for arm in results["arms"]],
        reports=_reports(results, out.parent),
    )


def _reports(results: Mapping[str, Any], folder: Path) -> list[tuple[str, list[tuple[str, str]]]]:
    """Of each arm the links to the reports of its runs, as (words, address)."""
    found = []
    for arm in results["arms"]:
        # A name that is no name of a folder could lead elsewhere.
        is_name = arm["arm"] not in (".", "..") and not set("/\0") & set(arm["arm"])
        files = [(f"seed {seed}", run_folder(folder, arm["arm"], seed) / REPORT) for seed in results["seeds"]]
        links = [(words, _address(file, folder)) for words, file in files if is_name and _is_file(file)]
        if links:
            found.append((arm["arm"], links))
    return found


def _address(file: Path, folder: Path) -> str:
    return "/".join(quote(os.fsencode(part), safe="") for part in file.relative_to(folder).parts)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no folder can have
        return False
