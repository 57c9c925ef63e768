"""The result of `dice winrate` as one JSON object, with what a reader of the figures has to know."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from dice_py.evaluation.winrate.comparisons import Comparisons
from dice_py.evaluation.winrate.difficulty import Difficulty
from dice_py.evaluation.winrate.length_control import ModelRates, WinRates

LEAST_MODELS = 5
"""A joint fit of fewer models has no say on the difficulty of prompts (docs/winrate.md has the errors by number)."""

_NAMED = 3


def summarize(comparisons: Comparisons, rates: WinRates, given: Difficulty | None) -> dict[str, Any]:
    """The summary: rates in percent, lengths in characters, models by their length-controlled win rate.

    Args:
        given: the difficulty that was given; None where it was fitted.

    Returns:
        `models` (the baseline among them, at 50 by definition), `baseline`, `prompts`, `comparable` (whether the
        length-controlled figures may be compared with those of other fits), `difficulty` (what γ is from), `notes`.
    """
    notes = [*comparisons.notes, *_counts(rates.models)]
    fitted = [model for model in rates.models if model.controlled_prompts]
    is_comparable, why = _comparable(comparisons.baseline, len(fitted), given)
    if fitted and why is not None:
        notes.append(why)
    models = [{**asdict(model), "baseline": False} for model in rates.models]
    models.append(_baseline(comparisons))
    models.sort(key=_rank)
    source = rates.difficulty
    return {
        "models": models,
        "baseline": comparisons.baseline,
        "prompts": comparisons.table["prompt"].n_unique(),
        "comparable": bool(fitted) and is_comparable,
        "difficulty": None
        if source is None
        else {
            "from": "this fit" if given is None else "an earlier fit",
            "models": len(source.models),
            "prompts": len(source.gamma),
            "baseline": source.baseline,
        },
        "notes": notes,
    }


def _rank(model: dict[str, Any]) -> tuple[bool, float, str]:
    """Highest first; those without a length-controlled figure last, by the plain one."""
    controlled = model["length_controlled_win_rate"]
    rate = controlled if controlled is not None else model["win_rate"]
    return controlled is None, -(rate if rate is not None else -1.0), model["model"]


def _baseline(comparisons: Comparisons) -> dict[str, Any]:
    """The baseline against itself."""
    itself = ModelRates(
        model=comparisons.baseline,
        win_rate=50.0,
        win_rate_ci95=(50.0, 50.0),
        length_controlled_win_rate=50.0,
        length_controlled_win_rate_ci95=(50.0, 50.0),
        prompts=comparisons.table["prompt"].n_unique(),
        no_verdict=0,
        controlled_prompts=0,
        mean_length=comparisons.baseline_length,
    )
    return {**asdict(itself), "baseline": True}


def _comparable(baseline: str, fitted: int, given: Difficulty | None) -> tuple[bool, str | None]:
    if given is None:
        if fitted >= LEAST_MODELS:
            return True, None
        return False, (
            f"the length-controlled win rates are not comparable with others: the difficulty of prompts is fitted from "
            f"{fitted} model{'s' if fitted != 1 else ''}, and takes {LEAST_MODELS} or more. Give one of an earlier fit "
            "with --difficulty FILE (which --write-difficulty FILE writes), or the verdicts on more models"
        )
    if given.baseline != baseline:
        return False, (
            f"the length-controlled win rates are not comparable: the difficulty of prompts was fitted against "
            f"{given.baseline!r:.80}, and the baseline is {baseline!r:.80}"
        )
    return True, None


def _counts(models: list[ModelRates]) -> list[str]:
    """Notes on rows without a verdict, and on prompts that the length-controlled figures leave out."""
    notes = []
    silent = [model for model in models if model.no_verdict]
    if silent:
        total = sum(model.no_verdict for model in silent)
        notes.append(f"{total:,} rows have no verdict and are left out ({_names(silent)})")
    partial = [model for model in models if 0 < model.controlled_prompts < model.prompts]
    if partial:
        total = sum(model.prompts - model.controlled_prompts for model in partial)
        notes.append(
            f"{total:,} rows are left out of the length-controlled win rates, since a length or the prompt's "
            f"difficulty is not known ({_names(partial)})"
        )
    constant = [model for model in models if model.controlled_prompts and model.length_coefficient is None]
    if constant:
        notes.append(
            f"nothing can be said of the effect of length for {_names(constant)}: the difference from the baseline's "
            "length is the same at every prompt"
        )
    never = [model for model in models if model.prompts and not model.controlled_prompts]
    if never:
        notes.append(
            f"no length-controlled win rate of {_names(never)}: the lengths of the responses or of the baseline's are "
            "not known. A column of lengths (--length-column), the text, or --outputs FILE has them"
        )
    return notes


def _names(models: list[ModelRates]) -> str:
    names = ", ".join(f"{model.model:.80}" for model in models[:_NAMED])
    return names if len(models) <= _NAMED else f"{names} and {len(models) - _NAMED:,} more"
