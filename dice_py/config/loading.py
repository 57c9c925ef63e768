"""The resolved configuration of a run: pydantic models, YAML files and `--set a.b=c`.

Parsed before anything heavy is imported. Unknown keys are refused with the nearest known name. The paper's
settings are in configs/*.yaml; the defaults here are those of a first run on a model of one's own.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from dice_py.config.run import ONE_STAGE, WORLD_DEFAULTS, RunConfig
from dice_py.config.shared import Section
from dice_py.errors import UsageError


def _merge(into: dict[str, Any], update: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in update.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = _merge({}, value) if isinstance(value, Mapping) else value
    return into


def known_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """Dotted names of every key, in order of definition; `*` where the user gives a name."""
    names: list[str] = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        options = [field.annotation, *getattr(field.annotation, "__args__", ())]
        # In a mapping of sections the user gives the names: * stands for any.
        below = f"{prefix}{name}.*." if getattr(field.annotation, "__origin__", None) is dict else f"{prefix}{name}."
        for option in options:
            if isinstance(option, type) and issubclass(option, BaseModel):
                names.extend(known_keys(option, below))
    return names


def _nearest(unknown: str) -> str:
    """The end of a sentence about an unknown key: the known ones that it may have meant."""
    section, _, last = unknown.rpartition(".")
    # (section, key) of every known name
    known = [(name.rpartition(".")[0], name.rpartition(".")[2]) for name in known_keys()]
    siblings = [key for place, key in known if fnmatch.fnmatchcase(section, place)]
    near = [(section, key) for key in difflib.get_close_matches(last, siblings, n=1, cutoff=0.75)]
    near = near or [(place, key) for place, key in known if key == last]
    if not near:
        close = difflib.get_close_matches(last, [key for _, key in known], n=1, cutoff=0.7)
        near = [(place, key) for place, key in known if key in close]
    names = [f"'{place}.{key}'" if place else f"'{key}'" for place, key in near]
    if names:
        return f"did you mean {' or '.join(names)}?"
    return f"the keys {f'of {section!r} ' if section else ''}are {', '.join(siblings)}"


def _explain(error: ValidationError, source: str) -> UsageError:
    lines = []
    for item in error.errors():
        parts = [str(part) for part in item["loc"]]
        if item["type"] == "extra_forbidden":
            where = ".".join(parts)
            lines.append(f"unknown key '{where}'; {_nearest(where)}")
            continue
        # Beside keys, a place names the branch of a union that was tried: "literal['auto']", "float".
        where = ".".join(part for part in parts if part.replace("_", "").isalnum() and part != "float")
        text = item["msg"].removeprefix("Value error, ")
        got = "" if isinstance(item["input"], Section | dict) else f" (got {item['input']!r})"
        lines.append(f"{where}: {text}{got}" if where else text)
    return UsageError(f"{source}: " + "; ".join(dict.fromkeys(lines)))


def _yaml_problem(error: yaml.YAMLError) -> str:
    """In one line; PyYAML's own text takes several."""
    mark = getattr(error, "problem_mark", None)
    said = getattr(error, "problem", None) or str(error)
    return f"{said} (line {mark.line + 1}, column {mark.column + 1})" if mark else said


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"config file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"config file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"config file {path} is not valid YAML: {_yaml_problem(error)}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UsageError(f"config file {path} must hold a mapping of keys, not a {type(loaded).__name__}")
    return loaded


def _parse_set(assignment: str) -> dict[str, Any]:
    name, equals, text = assignment.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"--set {assignment}: write it as --set section.key=value")
    try:
        value = yaml.safe_load(text) if text.strip() else None
    except yaml.YAMLError as error:
        raise UsageError(f"--set {assignment}: the value is not valid YAML: {_yaml_problem(error)}") from None
    nested: Any = value
    for part in reversed(name.strip().split(".")):
        nested = {part: nested}
    result: dict[str, Any] = nested
    return result


def resolve(
    files: Iterable[Path] = (),
    assignments: Iterable[str] = (),
    overrides: Mapping[str, Any] | None = None,
    *,
    one_stage: bool = False,
) -> RunConfig:
    """Files in order, then `overrides` (from options such as --policy), then `--set` assignments.

    With `one_stage` the config is for a stage called alone: the world's defaults are not added, and nothing
    is asked for that only a whole run needs.

    Raises:
        UsageError: an unknown key (with the nearest known one), or a value out of its range.
    """
    given: dict[str, Any] = {}
    for path in files:
        _merge(given, _read_yaml(path))
    _merge(given, dict(overrides or {}))
    for assignment in assignments:
        _merge(given, _parse_set(assignment))
    model = given.get("model")
    named = isinstance(model, Mapping) and model.get("policy") is not None
    base: dict[str, Any] = {} if named or one_stage else _merge({}, WORLD_DEFAULTS)
    try:
        return RunConfig.model_validate(_merge(base, given), context=ONE_STAGE if one_stage else None)
    except ValidationError as error:
        raise _explain(error, "config") from None


def dump(config: RunConfig) -> str:
    """The resolved config as YAML, every key present."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text


def load_resolved(path: Path) -> RunConfig:
    """A `config.yaml` written by `dump`: nothing is added to it, not even the world's defaults."""
    try:
        return RunConfig.model_validate(_read_yaml(path))
    except ValidationError as error:
        raise _explain(error, str(path)) from None
