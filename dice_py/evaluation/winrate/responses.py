"""Reads files with one row per response, each with the preference for it over the baseline's response."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import polars as pl

from dice_py.errors import DataError, UsageError
from dice_py.evaluation.winrate.comparisons import (
    COMPARISONS,
    Comparisons,
    build_comparisons,
    no_such_baseline,
    read_length,
    read_preference,
    text_key,
)
from dice_py.rows.row import Row
from dice_py.rows.sources import read_rows

PERCENT = 100.0

Lengths = Mapping[tuple[str, str], int]
"""Characters of a response, by prompt and model."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns. `length` None: `response_chars` where a row has it, else the length of the response."""

    prompt: str = "prompt_id"
    model: str = "model"
    preference: str = "score"
    length: str | None = None
    response: str = "response"
    instruction: str = "prompt"


Scale = Literal["auto", "1", "100"]
"""The upper end of the preferences: auto is 100 where any is above 1, or where the baseline's own are 50."""


def read_responses(
    files: Sequence[Path], baseline: str | None, columns: Columns, scale: Scale = "auto", lengths: Lengths | None = None
) -> Comparisons:
    """The comparisons of files with one row per response.

    The preferences are against the baseline, whose own rows give the lengths that others are compared with.

    Args:
        lengths: of responses that the files do not have, such as the baseline's.

    Raises:
        DataError: a row cannot be used; the message names it.
        UsageError: the baseline is none of the models, and `lengths` has no response of it either.
    """
    rows = [_read(row, columns) for file in files for row in read_rows(file)]
    source = ", ".join(str(file) for file in files)
    if not rows:
        raise DataError(f"{source} holds no rows; give one row per response")
    table = pl.DataFrame(rows, schema=COMPARISONS, orient="row")
    models = set(table["model"].unique())
    if baseline is None or (baseline not in models and not _has_model(lengths, baseline)):
        raise no_such_baseline(baseline, list(models), source)
    table, notes = _scaled(table, baseline, scale, source)
    table = table.with_columns(length=pl.coalesce("length", _looked_up(table, lengths, None)))
    of_baseline = table.filter(pl.col("model") == baseline)
    if of_baseline["prompt"].n_unique() == len(of_baseline):  # else build_comparisons says which is there twice
        table = table.with_columns(
            pl.col("prompt")
            .replace_strict(of_baseline["prompt"], of_baseline[name], default=None, return_dtype=COMPARISONS[name])
            .alias(f"baseline_{name}")
            for name in ("length", "response")
        )
        table = table.with_columns(baseline_length=pl.coalesce("baseline_length", _looked_up(table, lengths, baseline)))
    return build_comparisons(table.select(*COMPARISONS), baseline, source, notes)


def _has_model(lengths: Lengths | None, model: str) -> bool:
    return any(name == model for _, name in lengths or {})


def _looked_up(table: pl.DataFrame, lengths: Lengths | None, model: str | None) -> pl.Series:
    """Lengths of the row's own model or of `model`, by the prompt's id or its text; null where there is none."""
    found = lengths or {}
    names: Iterable[str] = table["model"] if model is None else [model] * len(table)
    keys = zip(table["prompt"], table["instruction"], names, strict=True)
    values = [found.get((prompt, name), found.get((text, name))) for prompt, text, name in keys]
    return pl.Series("looked_up", values, dtype=pl.Int64)


def _read(row: Row, columns: Columns) -> tuple[Any, ...]:
    values, where = row.columns, row.where
    text = values.get(columns.response)
    instruction = values.get(columns.instruction)
    dataset, annotator = values.get("dataset"), values.get("annotator")
    return (
        text_key(_value(values, columns.prompt, where, "prompt"), where, columns.prompt),
        text_key(_value(values, columns.model, where, "model"), where, columns.model),
        read_preference(_value(values, columns.preference, where, "preference"), where, columns.preference, PERCENT),
        _length(values, columns, where),
        None,
        instruction if isinstance(instruction, str) else None,
        text if isinstance(text, str) else None,
        None,
        dataset if isinstance(dataset, str) else None,
        annotator if isinstance(annotator, str) else None,
    )


def _value(values: dict[str, Any], column: str, where: str, option: str) -> Any:
    if column not in values:
        raise DataError(
            f"{where}: no column {column!r}; its columns are {', '.join(values) or 'none'}. Name the right one with "
            f"--{option}-column"
        )
    return values[column]


def _length(values: dict[str, Any], columns: Columns, where: str) -> int | None:
    if columns.length is not None:
        return read_length(_value(values, columns.length, where, "length"), where, columns.length)
    if values.get("response_chars") is not None:
        return read_length(values["response_chars"], where, "response_chars")
    text = values.get(columns.response)
    return len(text) if isinstance(text, str) else None


def _scaled(table: pl.DataFrame, baseline: str, scale: Scale, source: str) -> tuple[pl.DataFrame, tuple[str, ...]]:
    """The preferences from 0 to 1."""
    most = table["preference"].max()
    if not isinstance(most, float):
        raise DataError(f"{source}: no row has a preference")
    own = table.filter(pl.col("model") == baseline)["preference"].mean()
    if scale == "1" and most > 1:
        raise UsageError(f"--preference-scale 1: {source} has a preference of {most:g}")
    if scale == "100" or (scale == "auto" and (most > 1 or own == 50)):
        return table.with_columns(pl.col("preference") / PERCENT), ()
    notes: tuple[str, ...] = ()
    if scale == "auto" and own is None:
        notes = (
            "no preference is above 1, so they are read as from 0 to 1 (--preference-scale 100 reads them as percent)",
        )
    return table, notes
