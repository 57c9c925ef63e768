"""The section Configuration: settings, models, data, versions and seeds, and the command that makes the run again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from dice_py.config.loading import dump, resolve
from dice_py.config.run import RunConfig
from dice_py.reporting.stored_run import StoredRun
from dice_py.reporting.views import Table
from dice_py.runs.stored_config import CONFIG_FILE


def configuration(run: StoredRun) -> dict[str, Any]:
    """`name`, `command`, `tables` and `yaml` (all settings; "" where they are not known) of one run."""
    tables = [_models(run), _data(run), _versions(run)]
    if run.config is None:
        return {"name": run.name, "command": "", "tables": tables, "yaml": ""}
    tables.insert(0, _changed(run.config))
    tables.append(_seeds(run.config))
    return {"name": run.name, "command": again(run), "tables": tables, "yaml": dump(run.config)}


def again(run: StoredRun) -> str:
    """The command that makes the run again, in a folder of its own."""
    file = run.folder.absolute() / CONFIG_FILE
    target = run.folder.absolute().with_name(run.folder.absolute().name + "-again")
    return f"dice run -c {shlex.quote(str(file))} --run-dir {shlex.quote(str(target))}"


def settings_that_differ(runs: list[StoredRun]) -> Table:
    """The settings in which the runs are not equal, a column for each."""
    columns = [flat(run.config.model_dump(mode="json")) if run.config is not None else {} for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [
        [name, *(column.get(name, "–") for column in columns)]
        for name in names
        if len({column.get(name) for column in columns}) > 1
    ]
    nothing = ["none", *["" for _ in runs]]
    return Table("settings that differ", ["", *(run.name for run in runs)], rows or [nothing])


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as texts by dotted name."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return found


def _changed(config: RunConfig) -> Table:
    """The settings that are not the defaults of such a run: the world has its own."""
    defaults = resolve() if config.is_world else RunConfig.model_construct()
    before, now = flat(defaults.model_dump(mode="json")), flat(config.model_dump(mode="json"))
    rows = [[name, value, before.get(name, "–")] for name, value in now.items() if before.get(name) != value]
    caption = f"settings that are not the defaults{' of the synthetic world' if config.is_world else ''}"
    return Table(caption, ["", "this run", "default"], rows or [["none", "", ""]])


def _models(run: StoredRun) -> Table:
    rows = []
    for role, key in (("policy at the start", "policy"), ("reference of round 1", "reference")):
        model = run.data.get(key)
        if isinstance(model, dict):
            rows.append([role, str(model.get("folder", "–")), str(model.get("identity", "–"))])
    if run.outcome is not None:
        made = next(
            (
                str(entry["key"])
                for each in run.rounds
                for stage, entry in each.stages.items()
                if run.outcome.policy.parts[:2] == (each.name, stage) and entry.get("key")
            ),
            "–",
        )
        rows.append(["new policy", str(run.outcome.policy), made])
    return Table("models", ["", "folder", "identity, or key of its training"], rows or [["not known", "", ""]])


def _data(run: StoredRun) -> Table:
    # Of rounds that are not shown, other settings have left their prompts.
    shown = ("inputs", "buffer", *(each.name for each in run.rounds))
    others = run.data.get("others", {})
    rows = [[name, str(digest or "–")] for name, digest in others.items() if name.partition("/")[0] in shown]
    return Table("data, with digests (xxh3-128)", ["file of the run", "digest"], rows or [["not known", ""]])


def _versions(run: StoredRun) -> Table:
    versions = run.data.get("versions", {})
    rows = [[str(name), str(version or "not installed")] for name, version in versions.items()]
    return Table("versions", ["package", "version"], rows or [["not known", ""]])


def _seeds(config: RunConfig) -> Table:
    rows = [["seed", str(config.seed)]]
    if config.is_world:
        rows.append(["world.seed", str(config.world.seed)])
    return Table("seeds, of which all random numbers follow", ["", ""], rows)
