"""Finds out what kind of file holds the verdicts, and reads it and the files of outputs that go with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import polars as pl

from dice_py.errors import DataError
from dice_py.evaluation.winrate.alpaca_eval import read_annotations
from dice_py.evaluation.winrate.arena_hard import answer_length, is_answer, is_judgment, read_judgments
from dice_py.evaluation.winrate.comparisons import COMPARISONS, Comparisons, build_comparisons, no_such_baseline
from dice_py.evaluation.winrate.responses import Columns, Lengths, Scale, read_responses
from dice_py.rows.sources import read_rows

Form = Literal["responses", "annotations", "judgments"]
"""One row per response; AlpacaEval's annotations.json; Arena-Hard's judgments."""


def file_form(file: Path) -> Form:
    """The form of a file, by the fields of its first row.

    Raises:
        DataError: the file cannot be read.
    """
    first = next(read_rows(file), None)
    values = {} if first is None else first.columns
    if is_judgment(values):
        return "judgments"
    return "annotations" if {"generator_1", "generator_2"} <= values.keys() else "responses"


def read_comparisons(
    files: Sequence[Path],
    baseline: str | None,
    columns: Columns | None = None,
    scale: Scale = "auto",
    outputs: Sequence[Path] = (),
) -> Comparisons:
    """The comparisons of one or more files of one form.

    Args:
        files: with the verdicts.
        columns, scale: of files with one row per response.
        outputs: AlpacaEval's model_outputs.json or Arena-Hard's answers, for lengths that the files do not have.

    Raises:
        DataError: a file or a row cannot be used, or the files are of different forms.
        UsageError: the baseline is missing or unknown.
    """
    forms = {file: file_form(file) for file in files}
    form = forms[files[0]]
    for file, other in forms.items():
        if other != form:
            raise DataError(f"{files[0]} holds {form}, and {file} holds {other}: give files of one kind")
    lengths = read_lengths(outputs)
    if form == "judgments":
        return read_judgments(files, baseline, lengths)
    if form == "annotations":
        return _annotated(files, baseline)
    return read_responses(files, baseline, columns or Columns(), scale, lengths)


def read_lengths(files: Sequence[Path]) -> Lengths:
    """Characters of the responses in files of outputs, by prompt (the instruction, for AlpacaEval's) and model.

    Raises:
        DataError: a row is neither of AlpacaEval's nor of Arena-Hard's, or a response is there twice.
    """
    lengths: dict[tuple[str, str], int] = {}
    for file in files:
        for row in read_rows(file):
            values = row.columns
            if is_answer(values):
                key, length = answer_length(row, values)
            else:
                text = [values.get(name) for name in ("instruction", "generator", "output")]
                if not all(isinstance(value, str) for value in text):
                    raise DataError(
                        f"{row.where}: --outputs takes AlpacaEval's model_outputs.json (instruction, output and "
                        "generator) and Arena-Hard's model_answer files (uid and messages, or question_id and choices)"
                    )
                key, length = (str(text[0]), str(text[1])), len(str(text[2]))
            if lengths.setdefault(key, length) != length:
                raise DataError(f"{row.where}: a second output of {key[1]!r:.80} for {key[0]!r:.80}; keep one")
    return lengths


def _annotated(files: Sequence[Path], baseline: str | None) -> Comparisons:
    """The comparisons of annotations.json files, whichever side the baseline is on."""
    source = ", ".join(str(file) for file in files)
    rows = pl.concat(
        [read_annotations(file).with_row_index("row").with_columns(file=pl.lit(str(file))) for file in files]
    )
    first, second = pl.col("generator_1") == baseline, pl.col("generator_2") == baseline
    if baseline is None or not rows.select((first | second).any()).item():
        raise no_such_baseline(baseline, sorted({*rows["generator_1"], *rows["generator_2"]}), source)
    strangers = rows.filter(~(first | second))
    if len(strangers):
        row = strangers.row(0, named=True)
        raise DataError(
            f"{row['file']}, row {row['row']}: {row['generator_1']!r:.80} is compared with "
            f"{row['generator_2']!r:.80}, and not with the baseline {baseline!r:.80}; leave such rows out "
            f"({len(strangers):,} of {len(rows):,})"
        )
    ours, theirs = ("output_2", "output_1"), ("output_1", "output_2")
    table = rows.select(
        prompt="instruction",
        model=pl.when(first).then("generator_2").otherwise("generator_1"),
        preference=pl.when(first).then(pl.col("preference") - 1).otherwise(2 - pl.col("preference")),
        length=pl.when(first).then(pl.col(ours[0]).str.len_chars()).otherwise(pl.col(theirs[0]).str.len_chars()),
        baseline_length=pl.when(first)
        .then(pl.col(ours[1]).str.len_chars())
        .otherwise(pl.col(theirs[1]).str.len_chars()),
        instruction="instruction",
        response=pl.when(first).then(ours[0]).otherwise(theirs[0]),
        baseline_response=pl.when(first).then(ours[1]).otherwise(theirs[1]),
        dataset="dataset",
        annotator="annotator",
    )
    length = table.unique("prompt")["baseline_length"].mean()
    return build_comparisons(
        table.select(pl.col(name).cast(dtype) for name, dtype in COMPARISONS.items()),
        baseline,
        source,
        (),
        length if isinstance(length, float) else None,
    )
