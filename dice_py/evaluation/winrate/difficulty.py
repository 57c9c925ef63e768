"""The difficulty of prompts, from a fit over many models, and the file that carries it to later comparisons.

γ_x is high where models do well against the baseline. A file has γ by the prompt's key, and how the coefficients of
length and difficulty vary over the models of the fit (the prior of a model that was not among them).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dice_py.errors import DamagedError, DataError, UsageError
from dice_py.evaluation.winrate.logistic import Prior
from dice_py.storage.digests import file_state
from dice_py.storage.files import KEY_NAME, write_sealed
from dice_py.storage.keys import digest, versions

FORMAT = "dice prompt difficulty"
VERSION = 1


@dataclass(frozen=True)
class Difficulty:
    """γ of prompts and what it is from.

    Attributes:
        gamma: by the prompt's key.
        prior: of the coefficients of a further model.
        dispersion: of the judge's preferences (`logistic.dispersion_of`).
        baseline: that the models were compared with.
        models: the models of the fit.
        ridge: of the fit.
    """

    gamma: dict[str, float]
    prior: Prior
    dispersion: float
    baseline: str
    models: tuple[str, ...]
    ridge: float


def check_replaceable(path: Path) -> None:
    """Raises UsageError where another file than one of `write_difficulty` is at `path`."""
    if not path.exists():
        return
    try:
        value = _load(path)
    except DataError:
        value = {}
    if value.get("format") != FORMAT or KEY_NAME not in value:
        raise UsageError(f"--write-difficulty: {path} is there and holds something else: name another file")


def write_difficulty(path: Path, difficulty: Difficulty) -> None:
    """Writes a difficulty file (JSON), atomically. One that this function wrote is replaced.

    Raises:
        UsageError: another file is there.
    """
    check_replaceable(path)
    prior = difficulty.prior
    if not all(math.isfinite(value) for value in (prior.length_variance, prior.difficulty_variance)):
        raise UsageError("--write-difficulty: the difficulty of prompts needs two models or more to be fitted from")
    value = {
        "format": FORMAT,
        "version": VERSION,
        "baseline": difficulty.baseline,
        "models": list(difficulty.models),
        "ridge": difficulty.ridge,
        "dispersion": difficulty.dispersion,
        "length_coefficient": {"mean": prior.length_mean, "variance": prior.length_variance},
        "difficulty_coefficient": {"mean": prior.difficulty_mean, "variance": prior.difficulty_variance},
        "made_by": versions("numpy", "scipy"),
        "gamma": difficulty.gamma,
    }
    write_sealed(path, value, digest(FORMAT, value))


def read_difficulty(path: Path) -> Difficulty:
    """The content of a difficulty file.

    Raises:
        DataError: the file is absent, is no difficulty file, or a value cannot be used.
        DamagedError: it is not as it was written.
    """
    value = _load(path)
    if value.get("format") != FORMAT:
        raise DataError(f"{path} is no difficulty file; `dice winrate … --write-difficulty FILE` writes one")
    if value.get("version") != VERSION:
        raise DataError(f"{path} is of version {value.get('version')!r:.20}, and {VERSION} is read: write it again")
    if file_state(path) == "damaged":
        raise DamagedError(f"{path} is damaged: it is not as it was written. Write it again, or restore it from a copy")
    gamma = value.get("gamma")
    if not isinstance(gamma, dict) or not gamma:
        raise DataError(f"{path}: 'gamma' must be an object with a number for each prompt")
    dispersion = _number(path, value.get("dispersion"), "dispersion")
    if dispersion <= 0:
        raise DataError(f"{path}: the dispersion is {dispersion:g}, but must be above 0")
    models, baseline = value.get("models"), value.get("baseline")
    if not isinstance(baseline, str) or not isinstance(models, list) or not all(isinstance(m, str) for m in models):
        raise DataError(f"{path}: 'baseline' must be a name, and 'models' a list of names")
    return Difficulty(
        gamma={prompt: _number(path, number, "gamma", prompt) for prompt, number in gamma.items()},
        prior=Prior(*_moments(path, value, "length_coefficient"), *_moments(path, value, "difficulty_coefficient")),
        dispersion=dispersion,
        baseline=baseline,
        models=tuple(models),
        ridge=_number(path, value.get("ridge"), "ridge"),
    )


def _load(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} is no difficulty file; `dice winrate … --write-difficulty FILE` writes one")
    return value


def _moments(path: Path, value: dict[str, Any], name: str) -> tuple[float, float]:
    moments = value.get(name)
    if not isinstance(moments, dict):
        raise DataError(f"{path}: {name!r} must be an object with 'mean' and 'variance'")
    mean, variance = (_number(path, moments.get(part), name, part) for part in ("mean", "variance"))
    if variance <= 0:
        raise DataError(f"{path}: the variance of {name!r} is {variance:g}, but must be above 0")
    return mean, variance


def _number(path: Path, value: Any, *where: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= 1e6:
        raise DataError(f"{path}: {' of '.join(reversed(where))!r:.100} must be a number, not {value!r:.80}")
    return float(value)
