"""`report.html`: one page per run, with the tables of its rounds and the curve of length gap against α.

Static HTML and inline SVG, without scripts or external files: it can be mailed, and opens from a file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dice_py.errors import DataError
from dice_py.reporting.charts import gap_curve_svg
from dice_py.reporting.foreign_text import html_text
from dice_py.reporting.formatting import evaluation_notes, evaluation_rows, mining_rows, number, seconds
from dice_py.runs.best import comparison_text, stored_outcome
from dice_py.runs.folder import round_name
from dice_py.stages.benchmark import benchmark_metrics
from dice_py.storage.digests import file_state
from dice_py.storage.files import Manifest, read_json, write_sealed_text

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --accent: #2467c9; --muted: #777; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: .8rem 0; } caption { text-align: left; color: var(--muted); }
th, td { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line);
text-align: left; }
td { font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
svg { max-width: 100%; height: auto; } .axis { stroke: var(--line); }
.curve { stroke: var(--accent); fill: none;
stroke-width: 2; } .sampled { opacity: .4; }
.chosen { fill: var(--accent); } svg text { font-size: 12px; fill: currentColor; }
p.note { color: var(--muted); } ul.warnings li::marker { content: "⚠ "; }
"""

_UNKNOWN = "not known: the manifest does not name it"


def _table(caption: str, head: list[str], rows: list[list[str]]) -> str:
    top = "".join(f"<th>{html_text(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr><th>{html_text(first)}</th>{''.join(f'<td>{html_text(cell)}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    )
    caption = f"<caption>{html_text(caption)}</caption>"
    return f'<div class="scroll"><table>{caption}<tr>{top}</tr>{body}</table></div>'


def write_report(folder: Path) -> Path:
    """Writes `report.html` from the manifest and the artifacts of a run folder; returns its path."""
    manifest = Manifest(folder / "manifest.json").data
    rounds = sorted({name.split("/")[0] for name in manifest["stages"]})
    outcome = stored_outcome(manifest)
    if outcome is not None and outcome.ended_after is not None:
        # Later rounds are left over of other settings.
        rounds = [name for name in rounds if name <= round_name(outcome.ended_after)]
    parts = [*_head(folder.name, manifest), *_evaluation(folder, rounds)]
    for name in rounds:
        parts += _round(folder, name, manifest["stages"])
    parts.append("</body></html>")
    path = folder / "report.html"
    write_sealed_text(path, "\n".join(parts) + "\n", "<!-- {} -->")
    return path


def _head(name: str, manifest: dict[str, Any]) -> list[str]:
    start, reference = (_folder_of(manifest.get(role)) for role in ("policy", "reference"))
    return [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>DICE run {html_text(name)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>DICE run {html_text(name)}</h1>",
        f"<p>policy at the start: {html_text(start)}<br>reference of round 1: {html_text(reference)}</p>",
        *_outcome(manifest),
    ]


def _outcome(manifest: dict[str, Any]) -> list[str]:
    """The new policy, and how each round compares with its start (runs/best.py), as far as the run has come."""
    outcome = stored_outcome(manifest)
    if outcome is None:
        return []
    parts = [f"<p>new policy: {html_text(outcome.policy)}</p>"]
    for name, comparison in outcome.comparisons.items():
        parts.append(f"<p>{html_text(name)}: {html_text(comparison_text(comparison))}</p>")
    if outcome.ended_after is not None:
        text = f"The run ended after round {outcome.ended_after}, which was worse (rounds.stop_when=worse)."
        parts.append(f"<p>{html_text(text)}</p>")
    return parts


def _folder_of(model: Any) -> str:
    """The folder of a model that the manifest names."""
    return str(model.get("folder", _UNKNOWN)) if isinstance(model, dict) else _UNKNOWN


def _evaluation(folder: Path, rounds: list[str]) -> list[str]:
    """The metrics of all rounds, side by side."""
    files = {name: folder / name / "evaluate" / "metrics.json" for name in rounds}
    # A round that is still to be made again may have a damaged file.
    metrics = {name: values for name, file in files.items() if (values := _stored(file)) is not None}
    if not metrics:
        return []
    for name, values in metrics.items():
        benchmark = _stored(folder / name / "benchmark" / "benchmark.json")
        if benchmark is not None and isinstance(benchmark.get("metrics"), dict):
            metrics[name] = values | benchmark_metrics(benchmark)
    return [
        "<h2>Evaluation</h2>",
        _table("on held-out prompts and pairs", ["", *metrics], evaluation_rows(metrics)),
        "<p class='note'>Intervals are 95 % percentile bootstraps over prompts or pairs.</p>",
        *(f"<p class='note'>{html_text(note)}</p>" for note in evaluation_notes(metrics)),
    ]


def _round(folder: Path, name: str, entries: dict[str, Any]) -> list[str]:
    """The stages of a round, their counts, and its mining. `entries`: the manifest's, of all rounds."""
    stages = {key.split("/")[1]: entry for key, entry in entries.items() if key.startswith(name + "/")}
    rows = [[stage, str(entry.get("status", "–")), seconds(entry.get("seconds"))] for stage, entry in stages.items()]
    parts = [f"<h2>{html_text(name)}</h2>", _table("stages", ["stage", "status", "time"], rows)]
    for stage, entry in stages.items():
        if stage in ("generate", "score", "replay", "train") and entry.get("counts"):
            rows = [[key.replace("_", " "), number(value)] for key, value in entry["counts"].items()]
            parts.append(_table(stage, ["", ""], rows))
        if stage == "extrapolate" and entry.get("counts"):
            parts.append(_extrapolation(entry["counts"]))
    parts += _warnings(stages)
    mining = _stored(folder / name / "mine" / "mining.json")
    if mining is None:
        return parts
    try:
        return [*parts, *_mining(mining)]
    except (LookupError, TypeError, ValueError, AttributeError):  # of a round that is still to be made again
        return [*parts, "<p class='note'>mine: mining.json cannot be shown, since it is not as dice writes it.</p>"]


def _extrapolation(counts: dict[str, Any]) -> str:
    """What each α gave, and which was picked."""
    rows = [
        [number(each["alpha"]), number(each["value"]), number(each["mean_response_tokens"]), each["refused"] or ""]
        for each in counts["measured"]
    ]
    heads = ["α", counts["metric"].replace("_", " "), "mean response tokens", "refused"]
    return _table(f"extrapolate: α = {counts['alpha']:g}", heads, rows)


def _warnings(stages: dict[str, Any]) -> list[str]:
    """The warnings of a round's stages (runs/warnings.py), with their remedies."""
    items = [
        f"<li>{html_text(stage)}: {html_text(warning['text'])}</li>"
        for stage, entry in stages.items()
        for warning in entry.get("warnings", [])
        if isinstance(warning, dict) and "text" in warning
    ]
    return ["<p>warnings</p><ul class='warnings'>", *items, "</ul>"] if items else []


def _stored(file: Path) -> dict[str, Any] | None:
    """A JSON file of a stage, also of an older version, which wrote no digest; None if it is absent or damaged."""
    if file_state(file) not in ("intact", "unmarked"):
        return None
    try:
        value = read_json(file)
    except DataError:
        return None
    return value if isinstance(value, dict) else None


def _mining(summary: dict[str, Any]) -> list[str]:
    """The summary of mining, and its curve where it has one."""
    parts = [_table(f"mine (lengths in {summary['length']})", ["", ""], mining_rows(summary))]
    curve = summary["curve"]
    if curve["alpha"]:
        exact = curve.get("exact")  # missing in an older version's curve, which is exact
        note = "" if exact is None or all(exact) else " Lighter: of a sample of the prompts."
        parts += [
            "<p>Mean length gap of the best and the worst response, |best| − |worst|, against α; the dot is "
            f"the α in use.{note}</p>",
            gap_curve_svg(curve["alpha"], curve["mean_length_gap"], summary["alpha"], exact),
        ]
    return parts
