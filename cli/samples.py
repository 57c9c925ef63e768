"""`dice samples`: pairs of a round of a run, in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import Json, StageSeed
from cli.output import print_json
from dice_py.errors import UsageError

if TYPE_CHECKING:
    import polars as pl


def samples(
    folder: Annotated[Path, typer.Argument(help="A run folder.")],
    round_number: Annotated[
        int | None, typer.Option("--round", min=1, help="The round; default: the newest that has pairs.")
    ] = None,
    pairs: Annotated[int, typer.Option(min=1, max=2000, help="How many pairs, drawn by --seed.")] = 5,
    source: Annotated[str | None, typer.Option(help="Only of this source: mined, replay or replay:NAME.")] = None,
    seed: StageSeed = 0,
    as_json: Json = False,
) -> None:
    """Show pairs of a round: prompts, responses, rewards.

    They are drawn from those that the round keeps to be read (report.pairs). Long texts are cut, with --json they are
    complete.
    """
    import random

    from dice_py.runs.inspected import inspected_pairs
    from dice_py.storage.integrity import check_intact
    from dice_py.storage.keys import seed_for
    from dice_py.storage.parquet import read_parquet

    number, file = inspected_pairs(folder, round_number)
    check_intact([file])
    of_source = _of_source(read_parquet(file, ["source"])["source"], source, file)
    drawn = random.Random(seed_for(seed, "samples", number)).sample(of_source, min(pairs, len(of_source)))
    frame = read_parquet(file)[sorted(drawn)]
    if as_json:
        rows = [_finite(row) for row in frame.iter_rows(named=True)]
        print_json({"run": str(folder), "round": number, "of": len(of_source), "pairs": rows})
        return
    from cli.pair_text import print_pair
    from cli.terminal import say

    for row in frame.iter_rows(named=True):
        print_pair(row)
    say(f"{frame.height} of {len(of_source)} pairs that round {number} keeps to be read")


def _of_source(sources: pl.Series, wanted: str | None, file: Path) -> list[int]:
    """The numbers of the rows of one source; all without one.

    Raises:
        UsageError: there is no such source.
    """
    if wanted is None:
        return list(range(len(sources)))
    rows = [number for number, source in enumerate(sources) if source == wanted]
    if not rows:
        known = ", ".join(sorted({str(source) for source in sources}))
        raise UsageError(f"--source {wanted}: {file} has no such pairs; its sources are {known}")
    return rows


def _finite(value: Any) -> Any:
    """The value with null for numbers that JSON has not."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not -float("inf") < value < float("inf") else value
