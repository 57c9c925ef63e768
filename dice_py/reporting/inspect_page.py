"""The page of `dice inspect`: the pairs of a preference file, without a run."""

from __future__ import annotations

import re
from pathlib import Path

import polars as pl

from dice_py.reporting.pair_data import SCRIPTS, STYLES, pair_data
from dice_py.reporting.render import render_page
from dice_py.storage.digests import DIGEST_NAME, file_state
from dice_py.storage.files import write_sealed_text

_SEAL = "<!-- dice inspect, {} -->"
_SEALED = re.compile(rf"<!-- dice inspect, {re.escape(DIGEST_NAME)}: [0-9a-f]{{32}} -->\n\Z".encode())


def write_inspect_page(frame: pl.DataFrame, out: Path, *, title: str, facts: list[tuple[str, str]]) -> Path:
    """Writes the pairs as one HTML file, atomically, and returns its path. A file that is there is replaced.

    Args:
        frame: of schema INSPECTED_PAIRS.
        title: heading and title of the page.
        facts: names and texts that stand on top: the file, the models, β.
    """
    pairs = pair_data({title: frame}, whole="the file that was read")
    page = render_page("inspect.html.j2", title=title, styles=STYLES, scripts=SCRIPTS, facts=facts, pairs=pairs)
    write_sealed_text(out, page, _SEAL)
    return out


def is_inspect_page(path: Path) -> bool:
    """Whether a file is a page of `write_inspect_page`, as it was written."""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - 200))
        return _SEALED.search(file.read()) is not None and file_state(path) == "intact"
