"""Writes comparisons as AlpacaEval's files, so that its own tool can take over."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from dice_py.errors import DataError, UsageError
from dice_py.evaluation.winrate.alpaca_eval import write_annotations, write_model_outputs
from dice_py.evaluation.winrate.comparisons import Comparisons

NO_ANNOTATOR = "unknown"
"""AlpacaEval needs a name there."""


def write_alpaca_eval(folder: Path, comparisons: Comparisons) -> list[str]:
    """Writes `FOLDER/MODEL/annotations.json` and `FOLDER/MODEL/model_outputs.json` of each model, and the baseline's.

    A `/` in a name becomes `__`. Rows are in the order of the prompts in the files that were read.

    Returns:
        Notes: models whose rows AlpacaEval would number otherwise than its own.

    Raises:
        DataError: the text of an instruction or a response is not known.
        UsageError: a file is there already, or two models have the same folder.
    """
    table, prompts = comparisons.table, comparisons.table["prompt"].unique(maintain_order=True)
    _check_text(table)
    names = [comparisons.baseline, *comparisons.models]
    folders: dict[str, str] = {}
    for name in names:
        place = name.replace("/", "__")
        if place in (".", "..") or "\0" in place or folders.setdefault(place.casefold(), name) != name:
            raise UsageError(f"--write-annotations: no folder can be named after the model {name!r:.80}; rename it")
        for file in ("annotations.json", "model_outputs.json"):
            if (folder / place / file).exists():
                raise UsageError(f"--write-annotations: {folder / place / file} is there: name another folder")
    order = pl.DataFrame({"prompt": prompts}).with_row_index("order")
    table = table.join(order, on="prompt").sort("order")
    of_baseline = table.unique("prompt", keep="first", maintain_order=True)
    outputs = of_baseline.select("instruction", "dataset", output="baseline_response", generator=pl.lit(names[0]))
    write_model_outputs(folder / names[0].replace("/", "__") / "model_outputs.json", outputs)
    short = []
    for name in comparisons.models:
        rows = table.filter(pl.col("model") == name)
        target = folder / name.replace("/", "__")
        write_model_outputs(
            target / "model_outputs.json",
            rows.select("instruction", "dataset", output="response", generator="model"),
        )
        write_annotations(
            target / "annotations.json",
            rows.select(
                "instruction",
                "dataset",
                pl.col("annotator").fill_null(NO_ANNOTATOR),
                output_1="baseline_response",
                generator_1=pl.lit(names[0]),
                output_2="response",
                generator_2="model",
                preference=pl.col("preference") + 1,
            ),
        )
        if len(rows) < len(prompts):
            short.append(f"{name:.80} ({len(prompts) - len(rows):,})")
    if not short:
        return []
    return [
        f"{len(short):,} models lack prompts, so their rows are not numbered as AlpacaEval numbers its instructions, "
        f"by which its length-controlled figure takes the difficulty: {', '.join(short[:3])}"
    ]


def _check_text(table: pl.DataFrame) -> None:
    for column, what in (
        ("instruction", "of the instruction"),
        ("response", "of the response"),
        ("baseline_response", "of the baseline's response"),
    ):
        missing = table.filter(pl.col(column).is_null())
        if len(missing):
            row = missing.row(0, named=True)
            raise DataError(
                f"--write-annotations: the text {what} is not known for prompt {row['prompt']!r:.80} of "
                f"{row['model']!r:.80}, and AlpacaEval's files have it ({len(missing):,} rows)"
            )
