"""The one table that every file of verdicts becomes: a row for each response that was compared with the baseline's."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import polars as pl

from dice_py.errors import DataError, UsageError

COMPARISONS = pl.Schema(
    {
        "prompt": pl.String(),
        "model": pl.String(),
        "preference": pl.Float64(),
        "length": pl.Int64(),
        "baseline_length": pl.Int64(),
        "instruction": pl.String(),
        "response": pl.String(),
        "baseline_response": pl.String(),
        "dataset": pl.String(),
        "annotator": pl.String(),
    }
)
"""`prompt`: the prompt's key. `preference`: 0 to 1, the probability that the response beats the baseline's; null for no
verdict. `length`, `baseline_length`: characters, null where they are not known. The rest is text to write AlpacaEval's
files from, null where it is not known."""

_LARGEST = 2**53
_LISTED = 30
_BASELINE_TOLERANCE = 0.01


@dataclass(frozen=True)
class Comparisons:
    """Verdicts on models against one baseline.

    Attributes:
        table: in the columns of COMPARISONS, each prompt and model once, without rows of the baseline itself.
        baseline: its name.
        baseline_length: mean length of its responses in characters; None if it is not known.
        notes: what a person should know about how the files were read.
    """

    table: pl.DataFrame
    baseline: str
    baseline_length: float | None
    notes: tuple[str, ...] = ()

    @property
    def models(self) -> list[str]:
        """Names of the models, sorted."""
        return sorted(self.table["model"].unique())


def build_comparisons(
    rows: pl.DataFrame, baseline: str, source: str, notes: tuple[str, ...] = (), baseline_length: float | None = None
) -> Comparisons:
    """Checks the rows of a reader, and leaves the baseline's own out: by definition it wins half of the time.

    Args:
        rows: in the columns of COMPARISONS.
        source: the files, for error messages.

    Raises:
        DataError: a prompt is there twice for a model, or the baseline does not tie with itself.
        UsageError: there are no models besides the baseline.
    """
    twice = rows.group_by("prompt", "model", maintain_order=True).len().filter(pl.col("len") > 1)
    if len(twice):
        prompt, model, count = twice.row(0)
        raise DataError(
            f"{source}: prompt {prompt!r:.80} has {count} rows of the model {model!r:.80}, and one is compared: keep "
            f"one row of each prompt and model ({len(twice):,} such prompts and models)"
        )
    of_baseline = rows.filter(pl.col("model") == baseline)
    own = of_baseline["preference"].mean()
    if isinstance(own, float) and abs(own - 0.5) > _BASELINE_TOLERANCE:
        raise DataError(
            f"{source}: the rows of the baseline {baseline!r:.80} have a mean preference of {100 * own:.1f} %, and a "
            "model ties with itself: the preferences are against another baseline, or on another scale (see "
            "--preference-scale)"
        )
    others = rows.filter(pl.col("model") != baseline)
    if others.is_empty():
        raise UsageError(f"{source} has no model besides the baseline {baseline!r:.80}")
    length = baseline_length if baseline_length is not None else of_baseline["length"].mean()
    return Comparisons(others, baseline, length if isinstance(length, float) else None, notes)


def no_such_baseline(baseline: str | None, models: list[str], source: str) -> UsageError:
    """The error where --baseline is missing, or is none of the models."""
    shown = ", ".join(f"{name:.80}" for name in sorted(models)[:_LISTED])
    more = f" and {len(models) - _LISTED:,} more" if len(models) > _LISTED else ""
    what = (
        "name the baseline with --baseline" if baseline is None else f"--baseline: there is no model {baseline!r:.80}"
    )
    return UsageError(f"{what}; the models of {source} are {shown}{more}")


def text_key(value: Any, where: str, column: str) -> str:
    """A prompt's key or a model's name as text: text as it is, integers by their digits, the rest as JSON.

    Raises:
        DataError: the value is missing or empty.
    """
    if isinstance(value, str) and value:
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, dict | list) and value:
        try:
            return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError):
            pass  # dates, bytes, NaN
    raise DataError(f"{where}: {column!r} must be text or an integer, not {value!r:.80}; fix or remove the row")


def read_length(value: Any, where: str, column: str) -> int:
    """A length in characters.

    Raises:
        DataError: it is no integer of zero or more.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and 0 <= value < _LARGEST and value == int(value):
        return int(value)
    raise DataError(f"{where}: {column!r} must be a number of characters, not {value!r:.80}; fix or remove the row")


def read_preference(value: Any, where: str, column: str, most: float) -> float | None:
    """A preference on its own scale; None for null and NaN, which mean no verdict.

    Args:
        most: the upper end of the scale.

    Raises:
        DataError: it is no number from 0 to `most`.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most:
        return float(value)
    raise DataError(
        f"{where}: {column!r} must be a number from 0 to {most:g}, or null for no verdict, not {value!r:.80}; fix or "
        "remove the row"
    )
