"""`report.html`: one plain page per run, with the tables of its rounds and the curve of length gap against α.

Static HTML and inline SVG, no script and nothing fetched: it can be mailed, and opens from a file.
"""

from __future__ import annotations

import math
from html import escape
from pathlib import Path
from typing import Any

from dice_py.artefacts import Manifest, read_json, write_text

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
p.note { color: var(--muted); }
"""


def number(value: Any) -> str:
    """A number as a person reads it: whole ones grouped, others to four significant digits."""
    if value is None:
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, list):
        return " to ".join(number(item) for item in value)
    if isinstance(value, dict):
        # A count of zero says nothing; a measure of zero does.
        told = [f"{name} {number(item)}" for name, item in value.items() if item or isinstance(item, bool | float)]
        return ", ".join(told) or "none"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}"


def seconds(value: float | None) -> str:
    """A duration as a person reads it."""
    if value is None:
        return "–"
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _table(caption: str, head: list[str], rows: list[list[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr><th>{escape(first)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    )
    caption = f"<caption>{escape(caption)}</caption>"
    return f'<div class="scroll"><table>{caption}<tr>{top}</tr>{body}</table></div>'


def mining_rows(found: dict[str, Any]) -> list[list[str]]:
    """What mining found (`MinedPairs.summary`, or `mining.json`), as rows of a name and what a person reads.

    Counts of zero and what was not asked for are left out, and so is what an older version did not write.
    """

    def change(name: str) -> str:
        return f"{number(found[f'{name}_before'])} before, {number(found[f'{name}_after'])} after"

    of = f"of {number(found['prompts'])} prompts with {number(found['rows'])} responses"
    rows = [["pairs", f"{number(found['pairs'])} ({of})"]]
    rows += [[name, found[name]] for name in ("debias", "pairing") if name in found]
    if "pooled_rounds" in found:
        pooled = found["pooled_rounds"]
        rows.append(["candidates of rounds", number([pooled[0], pooled[-1]] if len(pooled) > 1 else pooled)])
    if found["alpha"] is not None:
        interval = f"the same pairs from {_alpha(found['alpha_low'])} to {_alpha(found['alpha_high'])}"
        rows.append(["alpha", f"{_alpha(found['alpha'])} ({interval})"])
    rows.append(["mean length gap", change("mean_length_gap")])
    if "reward_length_correlation_before" in found:
        rows.append(["correlation of reward and length", change("reward_length_correlation")])
        rows.append(["chosen is the longer", share(found["chosen_longer_share"])])
        rows.append(["margins", quantiles(found["margin_quantiles"])])
        if found["mean_consistency"] is not None:
            rows.append(["mean consistency", number(found["mean_consistency"])])
    dropped = [("rows", "dropped"), ("prompts", "dropped_prompts"), ("pairs", "dropped_pairs")]
    for what, name in dropped:
        if any(found.get(name, {}).values()):
            rows.append([f"dropped {what}", number(found[name]).replace("_", " ")])
    return rows


def _alpha(value: float | None) -> str:
    # The interval is narrow where there are many prompts. JSON has no word for infinity.
    return "infinity" if value is None else f"{value:.6g}"


def share(value: float | None) -> str:
    """A share of one as a percentage."""
    return "–" if value is None else f"{100 * value:.1f} %"


def quantiles(found: dict[str, float | None]) -> str:
    """Quantiles under names such as "min", "0.05" and "max", as a person reads them; – where there are none."""
    if None in found.values():
        return "–"

    def name(key: str) -> str:
        return key if key in ("min", "max") else f"{100 * float(key):g} %"

    return ", ".join(f"{name(key)}: {number(value)}" for key, value in found.items())


def gap_curve_svg(alphas: list[float], gaps: list[float], alpha: float | None, exact: list[bool] | None = None) -> str:
    """The falling step function of mean length gap against α, with the α in use marked on it.

    `gaps[i]` holds from `alphas[i]` to `alphas[i + 1]`, and is drawn lighter where `exact[i]` is False: there it is
    of a sample of the prompts.
    """
    given = zip(alphas, gaps, exact or [True] * len(alphas), strict=True)
    points = [(a, g, e) for a, g, e in given if math.isfinite(a) and math.isfinite(g)]
    if len(points) < 2:
        return "<p class='note'>The gap does not change with α here: there is no curve to draw.</p>"
    # A few break points far out would flatten everything near the answer.
    limit = max(min(points[-1][0], 4 * alpha) if alpha else points[-1][0], 1e-12)
    points = [p for p in points if p[0] <= limit]
    width, height, left, bottom, top = 640, 260, 70, 40, 15
    low = min(0.0, *(g for _, g, _ in points))
    high = max(0.0, *(g for _, g, _ in points))
    span = (high - low) or 1.0

    def label(at: float, value: float) -> str:
        return f'<text x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">{number(value)}</text>'

    def x(value: float) -> float:
        return left + value / limit * (width - left - 20)

    def y(value: float) -> float:
        return top + (high - value) / span * (height - top - bottom)

    # Consecutive steps of one kind are one path, from the first one's beginning to where the next kind begins.
    paths = {True: "", False: ""}
    for i, (a, g, e) in enumerate(points):
        if i == 0 or points[i - 1][2] != e:
            paths[e] += f"M{x(a):.1f},{y(g):.1f}"
        end, after = points[i + 1][:2] if i + 1 < len(points) else (limit, g)
        paths[e] += f"H{x(end):.1f}V{y(after):.1f}"
    drawn = "".join(f'<path class="curve{"" if e else " sampled"}" d="{path}"/>' for e, path in paths.items() if path)
    marked = ""
    reached = [g for a, g, _ in points if alpha is not None and a <= alpha]
    if alpha is not None and reached and alpha <= limit:
        marked = f'<circle class="chosen" cx="{x(alpha):.1f}" cy="{y(reached[-1]):.1f}" r="5"/>'
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="mean length gap against alpha">'
        f'<line class="axis" x1="{left}" y1="{y(0):.1f}" x2="{width - 20}" y2="{y(0):.1f}"/>'
        f'<line class="axis" x1="{left}" y1="{top}" x2="{left}" y2="{height - bottom}"/>'
        f"{drawn}{marked}"
        f"{''.join(label(y(value), value) for value in sorted({low, 0.0, high}))}"
        f'<text x="{left}" y="{height - 22}">0</text>'
        f'<text x="{width - 20}" y="{height - 22}" text-anchor="end">{number(limit)}</text>'
        f'<text x="{(width + left) / 2:.0f}" y="{height - 6}" text-anchor="middle">'
        "α (reward per unit of length)</text>"
        "</svg>"
    )


def write_report(folder: Path) -> Path:
    """Writes `report.html` from the manifest and the artefacts of a run folder."""
    manifest = Manifest(folder / "manifest.json").data
    rounds = sorted({name.split("/")[0] for name in manifest["stages"]})
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>DICE run {escape(folder.name)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>DICE run {escape(folder.name)}</h1>",
        f"<p>policy at the start: {escape(manifest['policy']['folder'])}<br>"
        f"reference of round 1: {escape(manifest['reference']['folder'])}</p>",
    ]
    metrics = {
        name: read_json(folder / name / "evaluate" / "metrics.json")
        for name in rounds
        if (folder / name / "evaluate" / "metrics.json").is_file()
    }
    if metrics:
        names = list(dict.fromkeys(key for found in metrics.values() for key in found))
        rows = [[name, *(number(found.get(name)) for found in metrics.values())] for name in names]
        parts += ["<h2>Evaluation</h2>", _table("on held-out prompts and pairs", ["", *metrics], rows)]
        parts.append("<p class='note'>Intervals are 95 % percentile bootstraps over prompts.</p>")
    for name in rounds:
        parts.append(f"<h2>{escape(name)}</h2>")
        stages = [(key.split("/")[1], value) for key, value in manifest["stages"].items() if key.startswith(name + "/")]
        rows = [[stage, entry["status"], seconds(entry.get("seconds"))] for stage, entry in stages]
        parts.append(_table("stages", ["stage", "status", "time"], rows))
        for stage, entry in stages:
            if stage in ("generate", "score", "replay", "train") and entry.get("counts"):
                rows = [[key.replace("_", " "), number(value)] for key, value in entry["counts"].items()]
                parts.append(_table(stage, ["", ""], rows))
        mining = folder / name / "mine" / "mining.json"
        if mining.is_file():
            found = read_json(mining)
            parts.append(_table(f"mine (lengths in {found['length']})", ["", ""], mining_rows(found)))
            curve = found["curve"]
            if curve["alpha"]:
                exact = curve.get("exact")  # an older version's curve has none, and is exact
                note = "" if exact is None or all(exact) else " Lighter: of a sample of the prompts."
                parts.append(
                    "<p>Mean length gap of the best and the worst response, |best| − |worst|, against α; the dot is "
                    f"the α in use.{note}</p>"
                )
                parts.append(gap_curve_svg(curve["alpha"], curve["mean_length_gap"], found["alpha"], exact))
    parts.append("</body></html>")
    path = folder / "report.html"
    write_text(path, "\n".join(parts))
    return path
