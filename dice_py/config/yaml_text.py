"""YAML as this program reads it: plain values of bounded size, each key once. Tags never make objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dice_py.errors import UsageError

_LARGEST_FILE = 2**20
_LARGEST_TREE = 20_000
"""Keys and values of a config with its aliases expanded."""
_DEEPEST = 50


class _UniqueKeys(yaml.SafeLoader):
    """A safe loader that refuses a key that is there twice, of which PyYAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int | float | bool | None):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r:.80} is there twice", key_node.start_mark
                    )
                seen.add(key)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text.

    Args:
        where: begins the error's sentence, such as "config file a.yaml".

    Raises:
        UsageError: not YAML, or nested too deeply, or larger than any config.
    """
    try:
        value = yaml.load(text, _UniqueKeys)
        _check_size(value, where)
    except yaml.YAMLError as error:
        raise UsageError(f"{where} is not valid YAML: {_problem(error)}") from None
    except RecursionError:
        raise UsageError(f"{where} is nested too deeply for a config; give a mapping of sections and keys") from None
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, OverflowError) as error:
        # PyYAML passes on what a date or a number of thousands of digits leads to.
        raise UsageError(f"{where} has a value that cannot be read: {str(error)[:200]}") from None
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a config file; {} of an empty one.

    Raises:
        UsageError: the file is absent, no regular file, larger than any config, not YAML, or no mapping.
    """
    where = f"config file {path}"
    try:
        if not path.exists():
            raise UsageError(f"{where} does not exist")
        if not path.is_file():
            raise UsageError(f"{where} is not a regular file (a folder, a pipe or a device); give a YAML file")
        if path.stat().st_size > _LARGEST_FILE:
            raise UsageError(f"{where} has {path.stat().st_size:,} bytes; a config is smaller than a MiB")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UsageError(f"{where} cannot be read: {error}") from None
    loaded = parse_yaml(text, where)
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UsageError(f"{where} must hold a mapping of keys, not a {type(loaded).__name__}")
    return loaded


def _check_size(value: Any, where: str) -> None:
    """Bounds a tree in which an alias counts each time: a few lines of aliases may stand for billions of values."""
    left, count = [(value, 0)], 0
    while left:
        item, depth = left.pop()
        count += 1
        if depth > _DEEPEST:
            raise RecursionError
        if count > _LARGEST_TREE:
            raise UsageError(f"{where} holds more than {_LARGEST_TREE:,} keys and values, aliases expanded")
        if isinstance(item, dict):
            for key in item:
                if not isinstance(key, str):
                    raise UsageError(f"{where} has the key {key!r:.80}, which is not text; quote it")
            left += [(part, depth + 1) for part in item.values()]
        elif isinstance(item, list | tuple | set):
            left += [(part, depth + 1) for part in item]


def _problem(error: yaml.YAMLError) -> str:
    """PyYAML's error in one line; its own text takes several."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1})" if mark else str(problem)
