"""Loads and stores the config of a run: YAML files, `--set a.b=c`, and the resolved `config.yaml`.

Nothing heavy is imported. Unknown keys are refused with the known name that was probably meant; config/renamed.py has
the names of older versions and of other libraries. The paper's settings are in configs/*.yaml.
"""

from __future__ import annotations

import difflib
import fnmatch
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dice_py.config.renamed import foreign_name, renaming
from dice_py.config.run import ONE_STAGE, WORLD_DEFAULTS, RunConfig
from dice_py.config.shared import SECRET, Section
from dice_py.config.yaml_text import parse_yaml, read_yaml
from dice_py.errors import UsageError

_DEEPEST_KEY = 10
_SHORTHAND = {"rounds": "count"}
"""Sections for which a value alone stands for one of their keys."""
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100


def _merge(into: dict[str, Any], update: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in update.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = _merge({}, value) if isinstance(value, Mapping) else value
    return into


def _in_full(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of one source without shorthands, so that `rounds: 3` leaves the other keys of `rounds`."""
    return {
        name: {_SHORTHAND[name]: value} if name in _SHORTHAND and not isinstance(value, Mapping) else value
        for name, value in settings.items()
    }


def known_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """Dotted names of every key, in order of definition; `*` stands for a name that the user chooses."""
    names: list[str] = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        options = [field.annotation, *getattr(field.annotation, "__args__", ())]
        is_mapping = getattr(field.annotation, "__origin__", None) is dict
        if is_mapping and options[-1] is Any:  # options that are passed on to a library
            names.append(f"{prefix}{name}.*")
        below = f"{prefix}{name}.*." if is_mapping else f"{prefix}{name}."
        for option in options:
            if isinstance(option, type) and issubclass(option, BaseModel):
                names.extend(known_keys(option, below))
    return names


def _suggestion(unknown: str) -> str:
    """The end of a sentence about an unknown key: the known keys that it may stand for."""
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


def _sentence(item: ErrorDetails) -> str:
    """One of pydantic's errors in this program's words."""
    parts = [str(part) for part in item["loc"]]
    key = ".".join(parts)
    renamed = renaming(key, item["input"])
    if renamed is not None:
        return renamed
    if item["type"] == "extra_forbidden":
        return f"unknown key '{key}'; {foreign_name(key) or _suggestion(key)}"
    # Besides keys, pydantic's location names the branch of a union that was tried: "literal['auto']", "float".
    where = ".".join(part for part in parts if part.replace("_", "").isalnum() and part != "float")
    text = item["msg"].removeprefix("Value error, ")
    is_hidden = item["type"] == SECRET or isinstance(item["input"], Section | dict)
    got = "" if is_hidden else f" (got {_SHORT.repr(item['input'])})"
    return f"{where}: {text}{got}" if where else text


def _usage_error(error: ValidationError, source: str) -> UsageError:
    """All of pydantic's errors in one sentence; `source` names the file or the input that holds them."""
    return UsageError(f"{source}: " + "; ".join(dict.fromkeys(_sentence(item) for item in error.errors())))


def _older_version(error: ValidationError, path: Path) -> UsageError | None:
    """The error for a stored config with key names of version 0.1; None where it has none of them."""
    renamings = [renaming(".".join(map(str, item["loc"])), item["input"]) for item in error.errors()]
    changed = [text for text in renamings if text is not None]
    if not changed:
        return None
    more = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
    return UsageError(
        f"{path}: this run was made by an earlier version of dice, in which config keys had other names "
        f"({'; '.join(changed[:3])}{more}). Start a new run, or finish this one with version 0.1 "
        "(pip install 'dice-align<0.2')"
    )


def _parse_set(assignment: str) -> dict[str, Any]:
    name, equals, text = assignment.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"--set {assignment:.200}: write it as --set section.key=value")
    value = parse_yaml(text, f"--set {assignment:.200}: the value") if text.strip() else None
    if name.count(".") > _DEEPEST_KEY:
        raise UsageError(f"--set {assignment:.200}: no key has so many parts; write it as --set section.key=value")
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
    """The config from all sources; a later one overrides an earlier one, key by key.

    Args:
        files: YAML files, merged in order.
        assignments: `--set` assignments, "section.key=value"; they override the files and `overrides`.
        overrides: nested values of options such as --policy; they override the files.
        one_stage: the config is for a single stage. The synthetic world's defaults are not added, and what only a
            complete run needs is not required.

    Raises:
        UsageError: an unknown key (the message names the key that was probably meant), or a value out of its range.
    """
    settings: dict[str, Any] = {}
    for path in files:
        _merge(settings, _in_full(read_yaml(path)))
    _merge(settings, _in_full(overrides or {}))
    for assignment in assignments:
        _merge(settings, _in_full(_parse_set(assignment)))
    model = settings.get("model")
    has_model = isinstance(model, Mapping) and any(model.get(name) is not None for name in ("policy", "sft"))
    base: dict[str, Any] = {} if has_model or one_stage else _merge({}, WORLD_DEFAULTS)
    try:
        config = RunConfig.model_validate(_merge(base, settings), context=ONE_STAGE if one_stage else None)
    except ValidationError as error:
        raise _usage_error(error, "config") from None
    _check_accelerate_config(config)
    return config


def _check_accelerate_config(config: RunConfig) -> None:
    """Refuses a file of accelerate's that is not there: training, which reads it, comes after hours."""
    named = config.train.accelerate_config
    if named is None:
        return
    try:
        is_file = Path(named).expanduser().is_file()
    except (OSError, RuntimeError):
        is_file = False
    if not is_file:
        raise UsageError(
            f"config: train.accelerate_config: {named} does not exist (or is not a regular file); set it to a file "
            "that `accelerate config` wrote"
        )


def reassigned(config: RunConfig, assignments: Iterable[str]) -> RunConfig:
    """A resolved config with changed settings, "section.key=value".

    Raises:
        UsageError: as `resolve`.
    """
    settings = config.model_dump(mode="json")
    for assignment in assignments:
        _merge(settings, _in_full(_parse_set(assignment)))
    try:
        return RunConfig.model_validate(settings)
    except ValidationError as error:
        raise _usage_error(error, "config") from None


def dump(config: RunConfig) -> str:
    """The resolved config as YAML, every key present."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text


def load_resolved(path: Path) -> RunConfig:
    """Reads a `config.yaml` written by `dump`. No defaults of the synthetic world are added.

    Raises:
        UsageError: the file is absent or broken, or an earlier version wrote it with other key names.
    """
    try:
        return RunConfig.model_validate(read_yaml(path))
    except ValidationError as error:
        raise (_older_version(error, path) or _usage_error(error, str(path))) from None
