"""An audit as tables and lines: the rewards side by side, the slices of one, and the verdict."""

from __future__ import annotations

import textwrap
from typing import Any

from rich.table import Table

from cli.tables import print_table
from cli.terminal import say
from dice_py.reporting.formatting import number

_AGREEMENT = {
    "accuracy": "accuracy",
    "length_balanced_accuracy": "length-balanced",
    "accuracy_over_length": "over length alone",
    "brier": "Brier",
}
_SETS = {
    "roc_auc": "ROC AUC",
    "end_score": "end score",
    "max_score": "max score",
    "loss": "loss",
    "prompt_pearson": "Pearson in a prompt",
}
_MODELS = {
    "row_wise_pearson": "row-wise Pearson",
    "separability": "separability",
    "confidence_agreement": "confidence agreement",
    "kendall_tau": "Kendall",
    "spearman": "Spearman",
    "rank_brier": "Brier of ranks",
}


def print_audit(figures: dict[str, Any]) -> None:
    """Prints an audit (evaluation/audit/report.py) to stdout; the verdict comes last."""
    entries = [*figures["choices"], {"choice": "length alone", "verdict": "", "alpha": None, **figures["length_alone"]}]
    print_table(_agreement(figures, entries))
    say()
    for title, names in (("several responses to a prompt", _SETS), ("models compared", _MODELS)):
        if any(entry["metrics"][name]["value"] is not None for entry in entries for name in names):
            print_table(_columns_of(title, names, entries))
            say()
    print_table(_slices(figures))
    say()
    for line in _lines(figures):
        say(line)


def _agreement(figures: dict[str, Any], entries: list[dict[str, Any]]) -> Table:
    counted = f"{figures['comparisons']:,} comparisons of {figures['prompts']:,} prompts"
    title = f"{counted} ({figures['kind']}), with 95 % intervals"
    table = _table(title, ["reward", "α", *_AGREEMENT.values(), "verdict"])
    for entry in entries:
        cells = [_figure(entry["metrics"].get(name)) for name in _AGREEMENT]
        mark = " *" if entry["choice"] == figures["main"] else ""
        alpha = "" if entry["alpha"] is None else f"{entry['alpha']:.3g}"
        table.add_row(entry["choice"] + mark, alpha, *cells, entry["verdict"])
    return table


def _columns_of(title: str, names: dict[str, str], entries: list[dict[str, Any]]) -> Table:
    known = {name for name in names for entry in entries if entry["metrics"][name]["value"] is not None}
    shown = {name: head for name, head in names.items() if name in known}
    table = _table(title, ["reward", *shown.values()])
    for entry in entries:
        table.add_row(entry["choice"], *(_figure(entry["metrics"][name]) for name in shown))
    return table


def _slices(figures: dict[str, Any]) -> Table:
    """The slices of the reward that the verdict is on, beside length alone."""
    main = next(entry for entry in figures["choices"] if entry["choice"] == figures["main"])
    table = _table(f"slices of {figures['main']}", ["slice", "comparisons", "accuracy", "length alone"])
    for ours, length in zip(main["slices"], figures["length_alone"]["slices"], strict=True):
        cells = [_figure({"value": one["accuracy"], "ci95": one["ci95"]}) for one in (ours, length)]
        table.add_row(ours["slice"], number(ours["pairs"]), *cells)
    return table


def _lines(figures: dict[str, Any]) -> list[str]:
    lines = [f"* {figures['main']}: the reward that mining would pick pairs by, with these settings"]
    reasons: dict[str, list[str]] = {}
    for name, reason in figures["reasons"].items():
        reasons.setdefault(reason, []).append(name.replace("_", " "))
    for reason, names in reasons.items():
        lines += textwrap.wrap(f"not measured: {', '.join(names)}: {reason}", 120, subsequent_indent="  ")
    if figures["best_of"] is not None:
        lines.append(f"end score, max score and loss: of best-of-k curves, k from 1 to {figures['best_of']}")
    return [*lines, f"verdict: {figures['verdict']}: {figures['reason']}"]


def _figure(value: dict[str, Any] | None) -> str:
    if value is None or value["value"] is None:
        return "–"
    interval = value["ci95"]
    return f"{value['value']:.3f}" + ("" if interval is None else f" ({interval[0]:.3f} to {interval[1]:.3f})")


def _table(title: str, heads: list[str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for place, head in enumerate(heads):
        table.add_column(head, justify="left" if place == 0 or head == "verdict" else "right")
    return table
