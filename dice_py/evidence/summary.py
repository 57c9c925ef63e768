"""What the evidence prints at its end: each policy's figures in one line, then the claims."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dice_py.evidence.results import METRICS

_SHOWN = {
    "function_score": ("score", "+.3f"),
    "function_win_rate": ("win rate", ".3f"),
    "mean_response_tokens": ("tokens", ".1f"),
    "distinct_2": ("distinct-2", ".3f"),
    "kl_to_initial_reference": ("KL(SFT)", ".2f"),
    "kl_to_start": ("KL(π_1)", ".2f"),
}
_WIDTH = 11
_NAME = 44


def result_lines(results: Mapping[str, Any]) -> list[str]:
    """The results of `evidence_results` as a person reads them, as plain lines."""
    heads = "".join(f"{head:>{_WIDTH}}" for head, _ in _SHOWN.values())
    lines = [f"{'':<{_NAME}}{heads}"]
    for policy in results["policies"]:
        cells = "".join(f"{_cell(policy['metrics'][name], form):>{_WIDTH}}" for name, (_, form) in _SHOWN.items())
        lines.append(f"{policy['name']:<{_NAME}}{cells}")
    lines += ["", "differences, paired by prompt, with 95 % intervals:"]
    for each in results["contrasts"]:
        interval = each["difference"]["ci95"]
        within = "" if interval is None else f" ({interval[0]:+.3f} to {interval[1]:+.3f})"
        said = "" if each["verdict"] is None else f": {each['verdict']}"
        where = f"{each['arm']}, round {each['round']}"
        what = METRICS.get(each["metric"], each["metric"])
        lines.append(f"{each['text']} [{where}], {what}: {each['difference']['mean']:+.3f}{within}{said}")
    return lines


def _cell(value: Mapping[str, Any], form: str) -> str:
    return "–" if value["value"] is None else format(value["value"], form)
