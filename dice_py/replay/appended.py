"""The mined pairs of a round as rows of the replay buffer, gathered part by part."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import polars as pl

from dice_py.data import prompt_key
from dice_py.events import Report, no_report
from dice_py.replay.buffer import ReplayBuffer
from dice_py.replay.gathered import AT_ONCE, Prompts
from dice_py.replay.mined import Shards, gather_from, have_equal_answers, labels_of
from dice_py.storage.integrity import check_intact
from dice_py.storage.parquet import read_parquet
from dice_py.storage.schemas import PAIRS, fit

BUFFER = pl.Schema(
    {
        "key": pl.String(),
        **PAIRS,
        "margin": pl.Float32(),
        "chosen_length": pl.UInt32(),
        "rejected_length": pl.UInt32(),
        "source": pl.String(),
    }
)
"""The columns that a run appends to its buffer: the key of the prompt, the pair with its token ids, its margin, its
lengths (in the unit of mine.length), and its round as `source`; then the labels that mining added. The buffer adds
`round`, `index` and `priority`."""


def append_mined(
    buffer: ReplayBuffer,
    round_number: int,
    *,
    mined: Path,
    generations: list[Path],
    scores: list[Path],
    prompts: Path,
    key: str,
    report: Report = no_report,
) -> None:
    """Appends the mined pairs of a round to the buffer of a run (columns: `BUFFER`).

    Nothing is read if the round was appended with the same key.

    Args:
        mined: the mined pairs (schema MINED).
        generations, scores: the shards that the row numbers of `mined` count through, in order (schemas GENERATIONS
            and SCORES).
        prompts: the prompts that were sampled on (schema PROMPTS).
        key: the key of the mined pairs.
        report: receives a note with the number of pairs written.

    Raises:
        UsageError, DataError: as `ReplayBuffer.append`.
    """
    if buffer.is_appended(round_number, key, report):
        return
    check_intact([mined, *generations, *scores, prompts])
    pairs = read_parquet(mined)
    shards, asked = Shards.of(generations, scores), Prompts(prompts)

    def parts() -> Iterator[pl.DataFrame]:
        for some in pairs.iter_slices(AT_ONCE):
            yield _rows(some, gather_from(some, shards, asked.of(some["prompt_id"])), round_number)

    written = buffer.append(round_number, parts(), key)
    report("note", text=f"replay buffer: {written} of {pairs.height} mined pairs written")


def _rows(mined: pl.DataFrame, gathered: pl.DataFrame, round_number: int) -> pl.DataFrame:
    """Some of the mined pairs as rows of the buffer, without those of equal answers."""
    keys = [prompt_key(messages) for messages in gathered["prompt"].to_list()]
    appended = gathered.select(PAIRS.names()).with_columns(
        pl.Series("key", keys, dtype=pl.String),
        *(mined[name] for name in ("margin", "chosen_length", "rejected_length")),
        pl.lit(f"round-{round_number:02d}").alias("source"),
    )
    labels = labels_of(mined).drop("margin")
    return fit(appended, BUFFER).hstack(labels).filter(~have_equal_answers(gathered))
