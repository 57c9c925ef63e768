"""Writes docs/configuration.md from the config models: every key with its values, default and description.

    python docs/config_reference.py          writes the page (`make docs`)

tests/docs/test_docs.py fails when the page is not what this script writes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dice_py.config.run import WORLD_DEFAULTS, RunConfig

PAGE = Path(__file__).parent / "configuration.md"

INTRODUCTION = """\
# Configuration

<!-- Written by `make docs` from the config models. Edit the descriptions there, not here. -->

A run's config is built in this order, later values replacing earlier ones: the defaults below, YAML files (`-c FILE`,
in the order given), options such as `--policy`, then `--set section.key=value`. Values of `--set` are YAML: `null`,
`true`, `[0, 1]`. Unknown keys are refused, and the error names the nearest known key. The resolved config is stored as
`config.yaml` in the run folder.

```yaml
rounds: 3
model:
  policy: my-org/my-dpo-model
  reference: my-org/my-sft-model
train:
  lora:
    r: 16
```

`configs/llama3-8b.yaml` and `configs/zephyr-7b.yaml` hold the paper's settings. A dash in the default column marks a
key that must be given where its section is used. `NAME` is a name of your own, or that of an option of a library.
"""

Schema = dict[str, Any]


def _values(schema: Schema) -> str:
    """The values that a key takes, in words."""
    if "anyOf" in schema:
        return ", ".join(_values(option) for option in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type", "any")
    if kind == "null":
        return "`null`"
    if kind == "array":
        items = _values(schema["items"])
        return f"list of {items}" if items != "any" else "list"
    words = {"string": "text", "boolean": "`true`, `false`"}
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[name]:g}" for name, sign in signs.items() if name in schema and schema[name] < 2**62]
    return " ".join([words.get(kind, kind), " and ".join(bounds)]).strip()


def _code(value: object) -> str:
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def _default(field: Schema, required: bool) -> str:
    if required:
        return "–"
    return _code(field["default"] if "default" in field else [] if field.get("type") == "array" else {})


def _nested(field: Schema, schemas: Schema) -> tuple[str, Schema] | None:
    """The section that a key holds, and what to append to the key's name to reach the section's keys."""
    for option in [field, *field.get("anyOf", [])]:
        if "$ref" in option:
            return "", schemas[option["$ref"].rpartition("/")[2]]
        if isinstance(option.get("additionalProperties"), dict):
            return ".NAME", schemas[option["additionalProperties"]["$ref"].rpartition("/")[2]]
    return None


def _section(title: str, schema: Schema, schemas: Schema) -> list[str]:
    """A heading, the section's docstring and its table, then the sections inside it."""
    lines = [f"## {title}", "", " ".join(schema.get("description", "").split()), ""]
    top = schema["title"] == "RunConfig"
    rows: list[str] = []
    inside: list[str] = []
    for name, field in schema["properties"].items():
        nested = _nested(field, schemas)
        default = _default(field, name in schema.get("required", []))
        description = field.get("description", "")
        if nested is None:
            values = _values(field)
        else:
            suffix, below = nested
            path = f"`{name}{suffix}`" if top else f"`{title.strip('`')}.{name}{suffix}`"
            inside += _section(path, below, schemas)
            if top:
                continue
            values = "sections by name" if suffix else "section, `null`" if "anyOf" in field else "section"
            description = f"{description}; see {path}".removeprefix("; ")
        if field.get("additionalProperties") is True:  # options that are passed on to a library
            name, values, default = f"{name}.NAME", "text, number, `true`, `false`, `null`, list, mapping", "–"
        cells = (f"`{name}`", values, default, description.replace("|", r"\|"))
        rows.append(f"| {' | '.join(cells)} |")
    return [*lines, "| key | values | default | description |", "|---|---|---|---|", *rows, "", *inside]


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    """Dotted names and values of nested mappings."""
    items: list[tuple[str, object]] = []
    for name, value in values.items():
        items += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return items


def _world() -> list[str]:
    return [
        "## Defaults of the synthetic world",
        "",
        "A run that names no policy uses the synthetic world, and these values in place of the defaults above.",
        "",
        "| key | default |",
        "|---|---|",
        *(f"| `{name}` | {_code(value)} |" for name, value in _flat(WORLD_DEFAULTS)),
    ]


def page() -> str:
    """The text of docs/configuration.md."""
    schema = RunConfig.model_json_schema()
    schemas = schema.get("$defs", {})
    return "\n".join([INTRODUCTION, *_section("Top level", schema, schemas), *_world()]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
