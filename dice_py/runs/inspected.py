"""The pairs that the stage inspect has kept of each round of a run, to be read. Nothing is changed."""

from __future__ import annotations

import re
from pathlib import Path

from dice_py.errors import DataError, UsageError
from dice_py.runs.folder import check_plain, round_name
from dice_py.runs.stored_config import CONFIG_FILE, has_config

_ROUND = re.compile(r"round-(\d+)")


def inspected_pairs(folder: Path, number: int | None) -> tuple[int, Path]:
    """The file of a round's pairs to read (schema INSPECTED_PAIRS), and the round's number.

    Args:
        folder: of a run.
        number: None: the newest round that has pairs.

    Raises:
        UsageError: the folder holds no run.
        DataError: there are no such pairs.
    """
    if not (folder / CONFIG_FILE).is_file() and not has_config(folder):
        raise UsageError(f"{folder} holds no run (no {CONFIG_FILE}); `dice status` lists those under runs/")
    check_plain(folder, links=True)
    numbers = [int(match[1]) for path in folder.iterdir() if (match := _ROUND.fullmatch(path.name))]
    files = {one: folder / round_name(one) / "inspect" / "pairs.parquet" for one in sorted(numbers)}
    there = [one for one, file in files.items() if file.is_file()]
    wanted = number if number is not None else max(there, default=None)
    if wanted in there:
        return wanted, files[wanted]
    have = f"it has those of {', '.join(map(round_name, there))}" if there else "no round has any"
    which = "no pairs to read" if number is None else f"no pairs to read of {round_name(number)}"
    raise DataError(
        f"{folder} has {which} ({have}); a round gets them before it trains, unless report.pairs is 0: "
        f"dice resume {folder} makes those of a round that lacks them"
    )
