"""Verdicts on models against a baseline, drawn from the model that the estimator assumes, and files of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from scipy.special import expit

from dice_py.evaluation.winrate.comparisons import COMPARISONS, Comparisons

BASELINE = "baseline"


def drawn(models: int = 8, prompts: int = 120, seed: int = 0) -> tuple[Comparisons, dict[str, float]]:
    """Comparisons, and the true length-controlled win rate of each model in percent."""
    rng = np.random.default_rng(seed)
    gamma = rng.normal(0.0, 1.2, prompts)
    rows, truth = [], {}
    for model in range(models):
        name = f"model-{model}"
        phi, theta = rng.normal(1.8, 0.4), rng.normal(-1.0, 1.0)
        delta = np.round(rng.normal(rng.normal(-300.0, 400.0), 500.0, prompts)).astype(int)
        length = 2000 + delta
        chance = expit(phi * np.tanh(delta / delta.std(ddof=1)) + gamma + theta)
        preference = np.clip(chance + rng.normal(0.0, 0.05, prompts), 0.0, 1.0)
        truth[name] = 100 * float(expit(gamma + theta).mean())
        rows += [
            (f"prompt {at}", name, float(preference[at]), int(length[at]), 2000, f"prompt {at}", "", "", None, None)
            for at in range(prompts)
        ]
    return Comparisons(pl.DataFrame(rows, schema=COMPARISONS, orient="row"), BASELINE, 2000.0), truth


def swapped(comparisons: Comparisons) -> Comparisons:
    """The same verdicts seen from the other side: the baseline's response as the model's."""
    table = comparisons.table.with_columns(
        preference=1 - pl.col("preference"), length="baseline_length", baseline_length="length"
    )
    return Comparisons(table, comparisons.baseline, None)


def response_rows(models: int = 6, prompts: int = 30, seed: int = 0) -> list[dict[str, Any]]:
    """One row per response, in the default columns of `dice winrate`; the baseline's rows among them."""
    comparisons, _ = drawn(models, prompts, seed)
    rows: list[dict[str, Any]] = [
        {"prompt_id": at, "prompt": f"prompt {at}", "model": BASELINE, "score": 0.5, "response": "b" * 2000}
        for at in range(prompts)
    ]
    for prompt, model, preference, length in comparisons.table.select(
        "prompt", "model", "preference", "length"
    ).iter_rows():
        at = int(prompt.split()[1])
        text = "r" * max(length, 0)
        rows.append({"prompt_id": at, "prompt": prompt, "model": model, "score": preference, "response": text})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


ANNOTATION: dict[str, Any] = {
    "instruction": "Say hi", "output_1": "hi there", "generator_1": BASELINE, "output_2": "hi", "generator_2": "ours",
    "preference": 1.25, "annotator": "judge",
}  # fmt: skip
"""A row of AlpacaEval's annotations.json."""


def write_annotation_rows(path: Path, *changes: dict[str, Any]) -> Path:
    """An annotations.json with a row for each change of ANNOTATION."""
    path.write_text(json.dumps([{**ANNOTATION, **change} for change in changes]), encoding="utf-8")
    return path


def write_rows(path: Path, *changes: dict[str, Any]) -> Path:
    """A row of the baseline, and a row of `ours` for each change, as JSONL."""
    base = {"prompt_id": 1, "model": BASELINE, "score": 0.5, "response": "four"}
    return write_jsonl(path, [base, *({"prompt_id": 1, "model": "ours", "score": 1.0, **change} for change in changes)])


def judgment(first: Any, second: Any, **fields: Any) -> dict[str, Any]:
    """A judgment of Arena-Hard on `ours`, by the scores of both games."""
    return {"question_id": "q", "model": "ours", "judge": "j", "games": [{"score": first}, {"score": second}], **fields}
