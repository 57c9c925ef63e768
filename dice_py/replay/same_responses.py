"""Whether mined pairs are of the responses that their row numbers name: rewards and lengths are compared.

Row numbers fit any files of enough rows: those of another round, and those of the same round in another order.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from dice_py.errors import DataError
from dice_py.storage.lookup import look_up
from dice_py.storage.parquet import present, read_parquet

_SIDES = ("chosen", "rejected")
_LENGTHS = ("response_tokens", "response_chars")
_DISTINCT = 0.9
"""From this share of distinct values on, an equal reward is that of the same response, and no coincidence."""
_FEW = 3
"""So few lengths may be found elsewhere in their prompts by coincidence."""


def check_same_responses(mined: pl.DataFrame, rows: pl.DataFrame, generations: list[Path], scores: list[Path]) -> None:
    """Refuses pairs that were mined from other responses, or from these in another order.

    A file of the user's own may have been mined by other rewards, or by other lengths; but not by both.

    Args:
        mined: `chosen_row`, `rejected_row`, `prompt_id`; what is compared, where it is there: `chosen_reward`,
            `chosen_length` and the same of the rejected.
        rows: the rows that the pairs name, with `row`, and with `reward`, `response_tokens`, `response_chars` or
            without.
        generations, scores: the files, for errors, and to look for the values in other rows.

    Raises:
        DataError: they are others.
    """
    files = named(generations)
    rewards = _compared(mined, rows, "reward", "reward", files)
    lengths = {column: _compared(mined, rows, "length", column, files) for column in _LENGTHS}
    known = {column: pairs for column, pairs in lengths.items() if pairs is not None}
    agree = [_differing(pairs).is_empty() for pairs in (rewards, *known.values()) if pairs is not None]
    if agree and not any(agree):
        raise DataError(
            f"the mined pairs are of other responses than {files}: neither their rewards nor their "
            "lengths are those of the rows that they name. Give the generations and scores that were mined (if both "
            "columns were made otherwise: without chosen_reward and chosen_length nothing is compared)"
        )
    if rewards is not None and _are_elsewhere(_differing(rewards), scores):
        raise _reordered(named(scores), "rewards")
    if known and not any(_differing(pairs).is_empty() for pairs in known.values()):
        for column, pairs in known.items():
            if _are_in_their_prompts(_differing(pairs), generations, column):
                raise _reordered(files, "lengths")


def named(files: list[Path]) -> str:
    """Several files, as errors name them."""
    return f"{files[0]} and {len(files) - 1} more" if len(files) > 1 else ", ".join(map(str, files))


def _compared(mined: pl.DataFrame, rows: pl.DataFrame, value: str, column: str, files: str) -> pl.DataFrame | None:
    """`prompt_id`, the pairs' own value and that of the row, of both sides; None where there is nothing to compare."""
    if column not in rows.columns or any(f"{side}_{value}" not in mined.columns for side in _SIDES):
        return None
    parts = []
    for side in _SIDES:
        keys = mined.select(pl.col(f"{side}_row").cast(pl.UInt64).alias("row"))
        found = look_up(keys, rows, "row", who=f"the mined pairs' {side}_row", where=files)
        theirs = found[column].cast(pl.Float32, strict=False).alias("theirs")
        ours = mined[f"{side}_{value}"].cast(pl.Float32, strict=False).alias("ours")
        parts.append(pl.DataFrame([mined["prompt_id"], ours, theirs]))
    return pl.concat(parts)


def _differing(pairs: pl.DataFrame) -> pl.DataFrame:
    return pairs.filter((pl.col("ours") != pl.col("theirs")).fill_null(False))


def _are_elsewhere(differing: pl.DataFrame, scores: list[Path]) -> bool:
    """Whether all rewards that differ are those of other rows."""
    if differing.is_empty() or not all(present(file, "reward") for file in scores):
        return False
    rewards = pl.concat([read_parquet(file, ["reward"])["reward"].cast(pl.Float32, strict=False) for file in scores])
    is_distinct = rewards.n_unique() >= _DISTINCT * len(rewards)
    return is_distinct and bool(differing["ours"].is_in(rewards.unique().implode()).all())


def _are_in_their_prompts(differing: pl.DataFrame, generations: list[Path], column: str) -> bool:
    """Whether all lengths that differ are those of other responses to the same prompts."""
    if differing.height < _FEW or not all(present(file, column) for file in generations):
        return False
    parts = [read_parquet(file, ["prompt_id", column]) for file in generations]
    known = pl.concat(parts, how="vertical_relaxed").select(
        pl.col("prompt_id").cast(differing.schema["prompt_id"], strict=False),
        pl.col(column).cast(pl.Float32, strict=False).alias("ours"),
    )
    return differing.join(known, on=["prompt_id", "ours"], how="semi").height == differing.height


def _reordered(files: str, values: str) -> DataError:
    return DataError(
        f"{files}: the rows are in another order than when they were mined: the pairs' {values} are there, but not in "
        "the rows that the pairs name. Give the files as they were, or mine again"
    )
