"""A function of the user's own as a judge: from the texts of a prompt and a response to a number.

It is imported by its name, `package.module:name`, in the process that judges. Its key has the name and a digest of the
module's source: what the module imports is not in it.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar

import polars as pl

from dice_py.config.judges import FunctionConfig
from dice_py.config.shared import ModelConfig
from dice_py.errors import DataError, UsageError
from dice_py.evaluation.judges.base import ScoringJudge, conversations
from dice_py.evaluation.response_sets import prompt_text
from dice_py.events import Report, no_report
from dice_py.storage.keys import file_digest

_SETTING = "evaluate.judges.function.call"
_REPORTED = 256  # responses between two reports of progress
_RAISED = (Exception, SystemExit)
"""What code of the user's may raise. A script without a main guard calls sys.exit as it is imported."""


@dataclass(frozen=True)
class FunctionJudge(ScoringJudge):
    """Scores responses by a Python function."""

    name: ClassVar[str] = "function"

    call: str
    """`package.module:name`."""
    source: str
    """Digest of the module's source."""

    @staticmethod
    def of(config: FunctionConfig, models: ModelConfig) -> FunctionJudge:
        """The judge of a config section. It imports the function.

        Raises:
            UsageError: the module cannot be imported, or has no such function.
        """
        del models  # a function has no use for a device
        _function(config.call)
        return FunctionJudge(config.call, _source(config.call))

    def key_fields(self) -> dict[str, Any]:
        """The function's name and its module's source."""
        return {"call": self.call, "source": self.source}

    def scores(self, prompts: pl.DataFrame, samples: pl.DataFrame, report: Report = no_report) -> pl.Series:
        """The function's value of each response, Float64.

        Raises:
            DataError: the function fails, or returns no finite number; the message names the response. Or its module is
                no longer the one of the key.
            UsageError: the module cannot be imported any more.
        """
        function = _function(self.call)
        if _source(self.call) != self.source:
            raise DataError(
                f"the module of {self.call} ({_SETTING}) has changed since this evaluation began: repeat the command"
            )
        scores: list[float] = []
        for place, prompt, (answer,) in conversations(prompts, samples):
            scores.append(_score(function, self.call, prompt_text(prompt), answer["content"], place))
            if len(scores) % _REPORTED == 0 or len(scores) == samples.height:
                report("progress", stage="function", done=len(scores), total=samples.height, unit="responses")
        return pl.Series(scores, dtype=pl.Float64)


def _score(function: Callable[[str, str], Any], call: str, prompt: str, response: str, place: str) -> float:
    try:
        value = function(prompt, response)
    except _RAISED as error:
        raise DataError(f"{call} fails on {place}: {type(error).__name__}: {error}; mend the function") from error
    if not isinstance(value, Real):
        raise DataError(f"{call} returns {value!r:.80} for {place}, which is no number; it must return a float")
    try:
        score = float(value)
    except OverflowError:
        score = math.inf
    if not math.isfinite(score):
        raise DataError(f"{call} returns {score} for {place}; a score must be a finite number")
    return score


def _function(call: str) -> Callable[[str, str], Any]:
    module, _, name = call.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except _RAISED as error:
        raise UsageError(
            f"{_SETTING} is {call}, but {module} cannot be imported ({type(error).__name__}: {error}); install it, or "
            "name its folder in PYTHONPATH"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise UsageError(f"{_SETTING} is {call}, but {module} has no {name}; name a function of it")
        found = getattr(found, part)
    if not callable(found):
        kind = type(found).__name__
        raise UsageError(f"{_SETTING} is {call}, which is of type {kind}; name a function of prompt and response")
    function: Callable[[str, str], Any] = found
    return function


def _source(call: str) -> str:
    module = call.partition(":")[0]
    importlib.invalidate_caches()
    spec = importlib.util.find_spec(module)
    origin = None if spec is None or not spec.has_location else spec.origin
    if origin is None:
        raise UsageError(f"{_SETTING} is {call}, but {module} is not a module in a file; name one that is")
    return file_digest(Path(origin))
