"""The section Overview: warnings, the rounds as lines of stages, and what became of the run."""

from __future__ import annotations

from typing import Any

from dice_py.reporting.formatting import number, seconds
from dice_py.reporting.stored_run import StoredRound, StoredRun
from dice_py.reporting.views import Table
from dice_py.runs.best import comparison_text

_TO_DO = "to do"
_COUNTED = ("generate", "score", "inspect", "replay", "train", "reinforce")
"""Stages whose counts are a table; those of the others are shown in sections of their own."""


def overview(run: StoredRun) -> dict[str, Any]:
    """What the template shows of one run: `name`, `state`, `outcome`, `warnings`, `problems`, `removed`,
    `rounds`."""
    return {
        "name": run.name,
        "state": _state(run),
        "models": [[role, _folder_of(run.data.get(key))] for role, key in _MODELS],
        "outcome": _outcome(run),
        "warnings": [warning for each in run.rounds for warning in _warnings(each)],
        "problems": list(dict.fromkeys(run.problems)),
        "removed": run.removed,
        "rounds": [_round(run, name) for name in _round_names(run)],
    }


_MODELS = (("policy at the start", "policy"), ("reference of round 1", "reference"))


def _folder_of(model: Any) -> str:
    """The folder of a model that the manifest names."""
    unknown = "not known: the manifest does not name it"
    return str(model.get("folder", unknown)) if isinstance(model, dict) else unknown


def _state(run: StoredRun) -> str:
    words = {
        "finished": "finished",
        "running": "in progress when this page was written",
        "stopped": f"not finished; to go on: dice resume {run.folder}",
        "unknown": "not known, since its config cannot be read",
    }
    return words[run.state]


def _outcome(run: StoredRun) -> list[str]:
    """The new policy, and how each round compares with its start (runs/best.py), as far as the run has come."""
    if run.outcome is None:
        return []
    parts = [f"new policy: {run.outcome.policy}"]
    parts += [f"{name}: {comparison_text(comparison)}" for name, comparison in run.outcome.comparisons.items()]
    if run.outcome.ended_after is not None:
        parts.append(f"The run ended after round {run.outcome.ended_after}, which was worse (rounds.stop_when=worse).")
    return parts


def _warnings(each: StoredRound) -> list[dict[str, str]]:
    """The warnings of a round's stages (runs/warnings.py), with their remedies."""
    return [
        {"where": f"{each.name}, {stage}", "text": str(warning["text"])}
        for stage, entry in each.stages.items()
        for warning in entry.get("warnings", [])
        if isinstance(warning, dict) and "text" in warning
    ]


def _round_names(run: StoredRun) -> list[str]:
    return sorted({*run.planned, *(each.name for each in run.rounds)})


def _round(run: StoredRun, name: str) -> dict[str, Any]:
    """A round as a line of stages, and the counts of each as tables."""
    stages = next((each.stages for each in run.rounds if each.name == name), {})
    names = list(dict.fromkeys([*run.planned.get(name, []), *stages]))
    steps = []
    for stage in names:
        entry = stages.get(stage, {})
        status = str(entry.get("status", _TO_DO))
        if status == "running" and run.state != "running":
            status = "stopped"
        time = seconds(entry.get("seconds")) if status == "done" else ""
        steps.append(
            {"stage": stage, "status": status, "time": time, "count": _headline(stage, entry.get("counts", {}))}
        )
    spent = sum(entry.get("seconds") or 0.0 for entry in stages.values())
    tables = [
        Table("stages", ["stage", "status", "time"], [[s["stage"], s["status"], s["time"] or "–"] for s in steps])
    ]
    for stage, entry in stages.items():
        counts = entry.get("counts")
        if stage in _COUNTED and counts:
            tables.append(
                Table(stage, ["", ""], [[key.replace("_", " "), number(value)] for key, value in counts.items()])
            )
        if stage == "extrapolate" and counts:
            tables.append(_extrapolation(counts))
    return {"name": name, "time": seconds(spent) if spent else "", "steps": steps, "tables": tables}


def _headline(stage: str, counts: dict[str, Any]) -> str:
    """The one count of a stage that its box in the line has."""
    found = {
        "generate": ("responses", "responses"),
        "mine": ("pairs", "pairs"),
        "inspect": ("pairs", "pairs to read"),
        "train": ("steps", "steps"),
        "reinforce": ("steps", "steps"),
        "evaluate": ("eval_prompts", "prompts"),
    }.get(stage)
    if stage == "replay" and {"mined", "replay"} <= counts.keys():
        return f"{number(counts['mined'])} mined, {number(counts['replay'])} replayed"
    if stage == "score" and "mean_reward" in counts:
        return f"mean reward {number(counts['mean_reward'])}"
    if "skipped" in counts:
        return "skipped"
    if found is None or not isinstance(counts.get(found[0]), int | float):
        return ""
    return f"{number(counts[found[0]])} {found[1]}"


def _extrapolation(counts: dict[str, Any]) -> Table:
    """What each α gave, and which was picked."""
    rows = [
        [number(each["alpha"]), number(each["value"]), number(each["mean_response_tokens"]), each["refused"] or ""]
        for each in counts["measured"]
    ]
    heads = ["α", counts["metric"].replace("_", " "), "mean response tokens", "refused"]
    return Table(f"extrapolate: α = {counts['alpha']:g}", heads, rows)
