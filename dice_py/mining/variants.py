"""The variants of a comparison of minings: from `debias=none,linear,matched` to the options of each.

Some options belong to one value of another: `length_tolerance` to `debias="matched"`, for instance. Compared with
others, they are left out of the variants that do not take them. Options that contradict each other in any other way
are kept with the miner's own sentence, so that one variant that cannot be mined does not hide the others.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, get_args

import yaml
from pydantic import TypeAdapter, ValidationError

from dice_py.config.mining import MiningOptions, check_mining_values
from dice_py.config.yaml_text import parse_yaml
from dice_py.errors import UsageError

MAX_VARIANTS = 100

_BELONGS = {
    "length_tolerance": ("debias", ("matched",)),
    "length_ratio": ("debias", ("matched",)),
    "pairs_per_prompt": ("pairing", ("top_bottom", "all_pairs")),
}
"""Option → the option that it belongs to, and the values of that one that take it."""


@dataclass(frozen=True)
class Variant:
    """One mining of a comparison.

    Attributes:
        settings: the compared options of this variant, by name.
        options: all of its options; None if they contradict each other.
        error: the sentence for that; None if they do not.
    """

    settings: dict[str, Any]
    options: MiningOptions | None
    error: str | None = None

    @property
    def name(self) -> str:
        """Such as "debias=matched length_tolerance=20"."""
        return " ".join(f"{name}={show(value)}" for name, value in self.settings.items())


def show(value: Any) -> str:
    """A value as it is written in `--compare`."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def parse_axes(texts: Iterable[str]) -> dict[str, list[Any]]:
    """The compared options and their values, from texts such as "debias=none,linear".

    Values are YAML, as those of `--set`; one with a comma is quoted.

    Raises:
        UsageError: not of this form, no option of mining, or one option twice.
    """
    axes: dict[str, list[Any]] = {}
    for text in texts:
        name, values = _parse_axis(text)
        if name in axes:
            raise UsageError(f"--compare has {name} twice: give all of its values in one, {name}=value,value")
        axes[name] = values
    return axes


def _parse_axis(text: str) -> tuple[str, list[Any]]:
    name, equals, values = text.partition("=")
    name = name.strip().removeprefix("--").replace("-", "_")
    if not equals or not name or not values.strip():
        raise UsageError(f"--compare {text:.200}: write it as --compare option=value,value")
    _check_name(name, "--compare: ")
    listed = f"[{values}]"
    where = f"--compare {text:.200}: the list of values"
    parsed = parse_yaml(listed, where)
    # As written, for the names of columns: YAML would read 01 as a number.
    words = yaml.load(listed, yaml.BaseLoader)
    if not isinstance(parsed, list) or not all(isinstance(word, str) for word in words):
        raise UsageError(f"{where} has lists or mappings; write it as --compare option=value,value")
    return name, [_convert(name, value, word) for value, word in zip(parsed, words, strict=True)]


def _check_name(name: str, where: str) -> None:
    if name not in MiningOptions.model_fields:
        close = difflib.get_close_matches(name, MiningOptions.model_fields, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"the options are {', '.join(MiningOptions.model_fields)}"
        raise UsageError(f"{where}{name!r:.80} is no option of mining; {hint}")


def _convert(name: str, value: Any, word: str) -> Any:
    """A value of YAML in the option's own type, where the two do not agree: a word for text, 1e-3 for a number."""
    annotation: Any = MiningOptions.model_fields[name].annotation
    members = set(get_args(annotation)) or {annotation}
    if members <= {str, NoneType}:
        # The word none is `--truncated-column none`, too.
        return None if value is None or (name == "truncated_column" and word == "none") else word
    if isinstance(value, str):
        try:
            return TypeAdapter(annotation).validate_python(value)
        except ValidationError:
            return value  # which the miner's own check refuses in words
    return value


def combinations(axes: Mapping[str, Iterable[Any]]) -> list[dict[str, Any]]:
    """All combinations of the compared options' values; the last option changes fastest."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def make_variants(base: Mapping[str, Any], variants: Sequence[Mapping[str, Any]]) -> list[Variant]:
    """The variants with all of their options, in order. One that equals an earlier one is left out.

    Args:
        base: options that all variants share; those that are missing have their defaults.
        variants: the options of each that differ; they count more than `base`.

    Raises:
        UsageError: no or too many variants, an option that mining does not have, a value out of its range, an option in
            `base` that no variant takes, or variants that all contradict themselves.
    """
    if not variants:
        raise UsageError("there is no variant to compare: give at least one")
    if len(variants) > MAX_VARIANTS:
        raise UsageError(f"{len(variants)} variants are more than a table can show: compare at most {MAX_VARIANTS}")
    for name in dict.fromkeys([*base, *(name for variant in variants for name in variant)]):
        _check_name(name, "")
    defaults = MiningOptions().model_dump()
    given = {name: value for name, value in base.items() if value != defaults[name]}
    made: dict[str, Variant] = {}
    unused = set(_BELONGS) & set(given)
    for settings in variants:
        check_mining_values({**defaults, **given, **settings})
        variant, used = _make_variant(given, settings)
        unused -= used
        made.setdefault(repr(variant.options or (variant.settings, variant.error)), variant)
    if all(variant.options is None for variant in made.values()):
        raise UsageError(next(iter(made.values())).error or "")
    if unused:
        name = sorted(unused)[0]
        owner, values = _BELONGS[name]
        raise UsageError(f"{name} is for {owner} {' or '.join(map(repr, values))}, which no variant has: leave it out")
    return list(made.values())


def _make_variant(given: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[Variant, set[str]]:
    """A variant, and the options of `_BELONGS` that it takes."""
    own = dict(settings)
    values = {**given, **own}
    for name, (owner, takers) in _BELONGS.items():
        # Only where the variant itself sets the owner: else the option was asked for without it.
        if values.get(name) is not None and owner in settings and values[owner] not in takers:
            del values[name]
            own.pop(name, None)
    try:
        return Variant(own, MiningOptions(**values)), set(values)
    except UsageError as error:
        return Variant(own, None, str(error)), set(values)
