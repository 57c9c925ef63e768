"""`evidence.html`: the frontier of oracle score against KL, every policy's figures, and answers to read side by side.

The page has no script and needs no network. The model's answers are shown as text, whatever they hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from dice_py.evidence.results import METRICS, SFT, START
from dice_py.reporting import charts
from dice_py.reporting.charts import Row
from dice_py.reporting.formatting import number, seconds, share
from dice_py.reporting.render import render_page
from dice_py.reporting.views import Figure, Table
from dice_py.storage.files import write_sealed_text

PAGE = "evidence.html"
_SEAL = "<!-- dice evidence, {} -->"
_BY_ROUND = {
    "function_score": "oracle score",
    "mean_response_tokens": "tokens of an answer",
    "function_win_rate": "win rate over π_1",
}
_KL, _SCORE = "kl_to_initial_reference", "function_score"


def write_evidence_page(results: Mapping[str, Any], out: Path) -> Path:
    """Writes the page, atomically, and returns its path. A file that is there is replaced.

    Args:
        results: of `evidence_results`.
    """
    write_sealed_text(out, evidence_page(results), _SEAL)
    return out


def evidence_page(results: Mapping[str, Any]) -> str:
    """The HTML of the page."""
    why_not = charts.cannot_draw()
    with nullcontext() if why_not else charts.unchecked():
        figures = [] if why_not else [_frontier(results), *(_by_round(results, metric) for metric in _BY_ROUND)]
    return render_page(
        "evidence.html.j2",
        title=f"DICE evidence: short reviews by {results['model']}",
        styles=["style.css", "report.css", "evidence.css"],
        scripts=[],
        problems=[] if why_not is None else [why_not.replace("dice report", "dice evidence")],
        facts=_facts(results),
        annotator=_annotator_table(results["annotator"]),
        figures=figures,
        policies=policies_table(results),
        contrasts=contrasts_table(results),
        mining=_mining_table(results),
        answers=results["answers"],
        unfinished=results["unfinished"],
    )


def policies_table(results: Mapping[str, Any]) -> Table:
    """A row for each policy, with every metric and its interval."""
    rows = [[each["name"], *(_figure(each["metrics"][name]) for name in METRICS)] for each in results["policies"]]
    return Table("every policy, with 95 % intervals over prompts", ["", *METRICS.values()], rows)


def contrasts_table(results: Mapping[str, Any]) -> Table:
    """The ablation's differences, paired by prompt, each with its verdict."""
    rows = [
        [
            each["text"],
            each["arm"],
            number(each["round"]),
            METRICS.get(each["metric"], each["metric"]),
            _signed(each["difference"]),
            each["verdict"] or "no claim",
        ]
        for each in results["contrasts"]
    ]
    return Table("differences, paired by prompt", ["", "arm", "round", "of", "difference (95 % interval)", ""], rows)


def _facts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    sizes = results["sizes"]
    return [
        ("model", results["model"]),
        ("oracle", f"VADER's compound score, from −1 to 1 (vaderSentiment {results['oracle']})"),
        ("offline", f"{number(results['annotator']['measured']['pairs'])} pairs on {sizes['offline_prompts']} prompts"),
        ("rounds", f"{results['rounds']}, of {sizes['round_prompts']} prompts × {sizes['round_samples']} answers"),
        ("evaluation", f"{sizes['evaluation_prompts']} prompts × {sizes['evaluation_samples']} answers"),
        ("seed", number(results["seed"])),
        ("time of the runs", seconds(results["seconds"])),
        ("machine", results["machine"]),
    ]


def _annotator_table(annotator: Mapping[str, Any]) -> Table:
    measured, settings = annotator["measured"], annotator["settings"]
    shares = {
        "agrees with the oracle": "agreement",
        "prefers the longer answer": "prefers_longer",
        "the oracle prefers the longer answer": "longer_is_better",
    }
    rows = [[name.replace("_", " "), number(value)] for name, value in settings.items()]
    for text, name in shares.items():
        interval = measured[f"{name}_ci95"]
        within = "" if interval is None else f" ({share(interval[0])} to {share(interval[1])})"
        rows.append([text, share(measured[name]) + within])
    rows.append(["chosen − rejected, tokens", number(measured["length_gap"])])
    rows.append(["chosen − rejected, oracle score", number(measured["score_gap"])])
    return Table("the annotator of the offline pairs: its settings, and what its pairs show", ["", ""], rows)


def _mining_table(results: Mapping[str, Any]) -> Table:
    names = [name for name in results["mining"][0] if name not in ("arm", "round")] if results["mining"] else []
    rows = [
        [f"{each['arm']}, round {each['round']}", *(number(each.get(name)) for name in names)]
        for each in results["mining"]
    ]
    return Table("mining", ["", *(name.replace("_", " ") for name in names)], rows)


def _figure(value: Mapping[str, Any]) -> str:
    interval = value["ci95"]
    return number(value["value"]) + ("" if interval is None else f" ({number(interval)})")


def _signed(value: Mapping[str, Any]) -> str:
    interval = value["ci95"]
    text = f"{value['mean']:+.3g}" + ("" if interval is None else f" ({interval[0]:+.3g} to {interval[1]:+.3g})")
    return text.replace("-", "−")


def _series(results: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """The policies of each arm, by the arm's name: π_1, then each round's."""
    policies = results["policies"]
    (start,) = [each for each in policies if each["name"] == START]
    arms = dict.fromkeys(each["arm"] for each in policies if each["arm"] is not None)
    return {arm: [start, *(each for each in policies if each["arm"] == arm)] for arm in arms}


def _point(policy: Mapping[str, Any], series: str, place: int, x: str | None, y: str) -> Row | None:
    """A point of a plot with its intervals; None where a value is missing."""
    row: Row = {"series": series, "place": place, "name": policy["name"]}
    for axis, metric in (("x", x), ("y", y)):
        if metric is None:
            row["x"] = place
            continue
        value = policy["metrics"][metric]
        if value["value"] is None:
            return None
        low, high = value["ci95"] or (value["value"], value["value"])
        row |= {axis: value["value"], f"{axis}_low": low, f"{axis}_high": high}
    return row


def _rows(results: Mapping[str, Any], x: str | None, y: str) -> list[Row]:
    found = [
        _point(policy, arm, place, x, y)
        for arm, policies in _series(results).items()
        for place, policy in enumerate(policies)
    ]
    return [row for row in found if row is not None]


def _frontier(results: Mapping[str, Any]) -> Figure:
    """Oracle score against the KL from the SFT model, as figure 2 of arXiv 2305.18290 has it."""
    import altair as alt

    (sft,) = [each for each in results["policies"] if each["name"] == SFT]
    rows = _rows(results, _KL, _SCORE)
    start = _point(sft, SFT, 0, _KL, _SCORE)
    rows += [] if start is None else [start]
    styles = charts.by_series([*_series(results), SFT])
    x, y = (
        alt.X(**charts.number_axis("x", "KL from the SFT model, nats an answer", zero=True)),
        alt.Y(**charts.number_axis("y", "oracle score")),
    )
    base = alt.Chart(charts.data())
    chart = alt.layer(
        base.mark_rule(strokeWidth=1, opacity=0.5).encode(x=x, y="y_low:Q", y2="y_high:Q", color=styles["color"]),
        base.mark_rule(strokeWidth=1, opacity=0.5).encode(x="x_low:Q", x2="x_high:Q", y=y, color=styles["color"]),
        base.mark_line().encode(x=x, y=y, order=alt.Order("place:Q"), **styles),
        base.mark_point().encode(x=x, y=y, color=styles["color"]),
    )
    told = "; ".join(f"{row['name']}: {number(row['y'])} at {number(row['x'])} nats" for row in rows)
    note = "Each line goes from π_1, which all arms share, through the rounds. Bars are 95 % intervals over prompts."
    return Figure("oracle score against KL", charts.svg(chart, rows, f"Oracle score against KL. {told}."), note)


def _by_round(results: Mapping[str, Any], metric: str) -> Figure:
    import altair as alt

    rows = _rows(results, None, metric)
    styles = charts.by_series(list(_series(results)))
    base = alt.Chart(charts.data())
    x = {
        "x": alt.X("x:O", title="round (0: π_1)", axis=alt.Axis(labelAngle=0)),
        "xOffset": alt.XOffset("series:N"),
    }
    y = alt.Y(**charts.number_axis("y", ""))
    chart = alt.layer(
        base.mark_rule(strokeWidth=1.4).encode(y="y_low:Q", y2="y_high:Q", color=styles["color"], **x),
        base.mark_line().encode(y=y, **x, **styles),
        base.mark_point().encode(y=y, color=styles["color"], **x),
    )
    title = _BY_ROUND[metric]
    told = "; ".join(f"{row['name']}: {number(row['y'])}" for row in rows)
    return Figure(title, charts.svg(chart, rows, f"{title} by round, with 95 % intervals. {told}."))
