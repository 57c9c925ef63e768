"""The page of `dice inspect`: the pairs of a preference file, without a run."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from dice_py.reporting.pair_data import SCRIPTS, STYLES, pair_data
from dice_py.reporting.render import render_page
from dice_py.storage.files import write_text


def write_inspect_page(frame: pl.DataFrame, out: Path, *, title: str, facts: list[tuple[str, str]]) -> Path:
    """Writes the pairs as one HTML file, atomically, and returns its path. A file that is there is replaced.

    Args:
        frame: of schema INSPECTED_PAIRS.
        title: heading and title of the page.
        facts: names and texts that stand on top: the file, the models, β.
    """
    pairs = pair_data({title: frame}, whole="the file that was read")
    page = render_page("inspect.html.j2", title=title, styles=STYLES, scripts=SCRIPTS, facts=facts, pairs=pairs)
    write_text(out, page)
    return out
