"""Reads and writes AlpacaEval's two files, so that its own tool can take over, and this one can take over from it.

`model_outputs.json` holds one model's outputs; `annotations.json` holds the verdicts on pairs of outputs. Both are one
JSON list of objects. `preference` is 1 where the first output wins, 2 where the second wins, and between them where the
judge is not sure; 1.5 is a tie. Older versions wrote 0 for a tie. A row without a verdict has null.

AlpacaEval's length-controlled figure takes the difficulty of an instruction by the row's number, so the order of the
rows, and rows without a verdict, are kept. It also expects one `generator_1` (the baseline) and one `generator_2` (the
model) in a file.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.errors import DataError
from dice_py.rows.row import Row
from dice_py.rows.sources import read_rows
from dice_py.storage.files import write_text

OUTPUTS = pl.Schema(
    {"instruction": pl.String(), "output": pl.String(), "generator": pl.String(), "dataset": pl.String()}
)
"""Columns of model_outputs.json; `dataset` may be null."""

ANNOTATIONS = pl.Schema(
    {
        "instruction": pl.String(),
        "output_1": pl.String(),
        "generator_1": pl.String(),
        "output_2": pl.String(),
        "generator_2": pl.String(),
        "preference": pl.Float64(),
        "annotator": pl.String(),
        "dataset": pl.String(),
    }
)
"""Columns of annotations.json; `preference`, `annotator` and `dataset` may be null."""

_MAY_BE_NULL = ("preference", "annotator", "dataset")


def read_model_outputs(path: Path) -> pl.DataFrame:
    """The rows of a model_outputs.json, in the order of the file, in the columns of `OUTPUTS`.

    Further fields (`datasplit`, …) are left out.

    Raises:
        DataError: the file cannot be read, or a row lacks a field or has another type there; it names the row.
    """
    return _read(path, OUTPUTS, "model_outputs.json")


def read_annotations(path: Path) -> pl.DataFrame:
    """The rows of an annotations.json, in the order of the file, in the columns of `ANNOTATIONS`.

    `preference` is from 1 (the first output wins) to 2 (the second wins); an older 0 becomes 1.5, and NaN becomes null.
    Further fields (`raw_completion`, …) are left out.

    Raises:
        DataError: the file cannot be read, or a row lacks a field or has another type there; it names the row.
    """
    return _read(path, ANNOTATIONS, "annotations.json")


def write_model_outputs(path: Path, rows: pl.DataFrame) -> None:
    """Writes a model_outputs.json, atomically.

    Args:
        rows: `instruction`, `output` and `generator` (text), perhaps `dataset`; other columns are left out.

    Raises:
        DataError: a column is missing, or has a null where there may be none.
    """
    _write(path, rows, OUTPUTS)


def write_annotations(path: Path, rows: pl.DataFrame) -> None:
    """Writes an annotations.json, atomically, in the order of the rows.

    Args:
        rows: the columns of `ANNOTATIONS`; `dataset` may be absent, and other columns are left out. `preference` is
            from 1.0 (the first output wins) to 2.0 (the second wins), 1.5 for a tie, and null for no verdict.

    Raises:
        DataError: a column is missing, has a null where there may be none, or a preference is not from 1 to 2.
    """
    _write(path, rows, ANNOTATIONS)


def _read(path: Path, schema: pl.Schema, what: str) -> pl.DataFrame:
    columns: dict[str, list[Any]] = {name: [] for name in schema}
    for row in read_rows(path):
        values = row.columns
        for name in columns:
            columns[name].append(_preference(row, values) if name == "preference" else _text(row, values, name, what))
    if not columns["instruction"]:
        raise DataError(f"{path} holds no rows; give AlpacaEval's {what}")
    return pl.DataFrame(columns, schema=schema)


def _text(row: Row, values: dict[str, Any], name: str, what: str) -> str | None:
    value = values.get(name)
    if isinstance(value, str):
        return value
    if value is None and name in _MAY_BE_NULL:
        return None
    if name not in values:
        raise DataError(
            f"{row.where}: no field {name!r}; its fields are {', '.join(values) or 'none'}. A row of {what} has it"
        )
    raise DataError(f"{row.where}: {name!r} must be text, not {value!r:.80}; fix or remove the row")


def _preference(row: Row, values: dict[str, Any]) -> float | None:
    if "preference" not in values:
        raise DataError(
            f"{row.where}: no field 'preference'; its fields are {', '.join(values) or 'none'}. A row of "
            "annotations.json has it, with null for no verdict"
        )
    value = values["preference"]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value == 0:
            return 1.5
        if 1 <= value <= 2:
            return float(value)
    raise DataError(
        f"{row.where}: 'preference' is {value!r:.80}, but must be from 1 (the first output wins) to 2 (the second "
        "wins), or null for no verdict"
    )


def _write(path: Path, rows: pl.DataFrame, schema: pl.Schema) -> None:
    missing = [name for name in schema if name not in rows.columns and name != "dataset"]
    if missing:
        raise DataError(f"{path} cannot be written: there is no column {missing[0]!r}; columns are {rows.columns}")
    kept = rows.select(pl.col(name).cast(dtype) for name, dtype in schema.items() if name in rows.columns)
    for name in kept.columns:
        if name not in _MAY_BE_NULL and kept[name].null_count():
            at = kept[name].is_null().arg_true()[0]
            raise DataError(f"{path} cannot be written: {name!r} of row {at} is null")
    if "preference" in kept.columns:
        wrong = (~kept["preference"].is_between(1.0, 2.0) | kept["preference"].is_nan()).fill_null(False).arg_true()
        if len(wrong):
            value = kept["preference"][wrong[0]]
            raise DataError(f"{path} cannot be written: the preference of row {wrong[0]} is {value}, not from 1 to 2")
    write_text(path, json.dumps(kept.to_dicts(), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
