"""Settings that are passed on to a library: a free mapping of its options, beside the settings that this program has.

    class VllmConfig(Section):
        engine_args: PassedOptions = passed_options("any further option of vLLM's LLM")

        @field_validator("engine_args")
        @classmethod
        def _refuse_own(cls, value: PassedOptions) -> PassedOptions:
            return refuse_own(value, {"dtype": "it is model.dtype"})

The values are those of YAML and JSON. Which names and values a library takes is for the library to say: a stage tries
them before it works, and `refused_by` makes a sentence of the library's own error. A mapping that is set is part of a
stage's key; an empty one is not (`Section.key_dump`), so that keys of runs from before the setting stay as they were.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from dice_py.config.shared import ADDED
from dice_py.errors import UsageError


def _empty_for_none(value: Any) -> Any:
    """`null`, or nothing after the key, means no options."""
    return {} if value is None else value


def _check_plain(options: dict[str, Any]) -> dict[str, Any]:
    for name, value in options.items():
        if re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) is None:
            raise ValueError(f"{name!r:.80} is no name of an option: use letters, digits and underscores")
        _check_value(name, value)
    return options


def _check_value(name: str, value: Any) -> None:
    """Refuses what JSON cannot hold: it would change where the config is stored."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{name} has the key {key!r:.80}, which is not text; quote it")
            _check_value(name, item)
    elif isinstance(value, list):
        for item in value:
            _check_value(name, item)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} has {value}, but must hold finite numbers")
    elif not (value is None or isinstance(value, bool | int | float | str)):
        raise ValueError(
            f"{name} has a {type(value).__name__} ({str(value)[:40]!r}), but only texts, numbers, true, false, null, "
            "lists and mappings are passed on; quote it if a text is meant"
        )


PassedOptions = Annotated[dict[str, Any], BeforeValidator(_empty_for_none), AfterValidator(_check_plain)]
"""Options of a library by name. Values are None, bool, int, finite float, str, and lists and dicts of them."""


def passed_options(description: str) -> Any:
    """The field of a `PassedOptions` setting, empty by default, and then in no key."""
    return Field(default_factory=dict, description=description, json_schema_extra=ADDED)


def refuse_own(options: dict[str, Any], own: Mapping[str, str]) -> dict[str, Any]:
    """Refuses the options that this program sets itself.

    Args:
        own: their names, each with the end of a sentence: "it is model.dtype".

    Returns:
        `options`, unchanged, so that a validator can return them.

    Raises:
        ValueError: naming the first option and its reason.
    """
    for name in options:
        if name in own:
            raise ValueError(f"{name} cannot be passed on: {own[name]}")
    return options


def refused_by(library: str, setting: str, error: Exception | str, known: Iterable[str] = ()) -> UsageError:
    """The error for options that a library refuses: its own message in one line.

    Args:
        library: its name, or that of the class that takes the options.
        setting: the config key of the mapping, such as "generate.sampling_params".
        error: the library's; from pydantic, all of its findings are named.
        known: the library's names. Where the message quotes a name that is none of them, the nearest is named.
    """
    text = _message(error)
    names = list(known)
    quoted = next((name for name in re.findall(r"[`'\"](\w+)[`'\"]", text) if name not in names), None)
    near = difflib.get_close_matches(quoted, names, n=1, cutoff=0.7) if quoted is not None else []
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return UsageError(f"{setting}: {library} refuses it: {text}{hint}")


def _message(error: Exception | str) -> str:
    findings = getattr(error, "errors", None)
    if isinstance(error, Exception) and callable(findings):  # pydantic's own text takes several lines
        texts = []
        for item in findings():
            where = ".".join(str(part) for part in item["loc"])
            message = item["msg"].removeprefix("Value error, ")
            texts.append(f"{where}: {message}" if where else message)
        text = "; ".join(dict.fromkeys(texts))
    else:
        text = str(error).strip() or type(error).__name__
    return " ".join(text.split())[:500].removesuffix(".")
