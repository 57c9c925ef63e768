"""Says what changed between two keys of a stage, or two configs: by the names and values that decide them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dice_py.storage.keys import digest

_SHORT = 60  # characters of a value that is kept as it is; a longer one is kept as its digest
_NAMED = 5


def field_values(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields as one dict by dotted name; long values, such as lists of keys, as `{"digest": …}`."""
    values: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping) and value:
            values |= field_values(value, f"{prefix}{name}.")
        elif len(json.dumps(value, default=str)) <= _SHORT and not isinstance(value, Mapping):
            values[prefix + name] = value
        else:
            values[prefix + name] = {"digest": digest(value)}
    return values


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What differs between two results of `field_values`: "mine.length: tokens → chars", or a name alone."""
    texts = []
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name), after.get(name)
        if old == new:
            continue
        is_plain = name.rpartition(".")[0] and not isinstance(old, dict) and not isinstance(new, dict)
        texts.append(f"{name}: {_text(old)} → {_text(new)}" if is_plain else name)
    return texts


def listed(texts: list[str]) -> str:
    """The first few of `changes` in one line."""
    more = f"; and {len(texts) - _NAMED} more" if len(texts) > _NAMED else ""
    return "; ".join(texts[:_NAMED]) + more


def _text(value: Any) -> str:
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)
