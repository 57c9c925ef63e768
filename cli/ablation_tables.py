"""An ablation as tables and lines: arms by round, the claims with their verdicts, and what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from cli.tables import print_table
from cli.terminal import say
from dice_py.reporting.ablation_results import (
    START,
    checked,
    claims_by_metric,
    column_texts,
    gap_texts,
    intervals_text,
    measured,
    score,
    shown_metrics,
    unfinished_runs,
)
from dice_py.reporting.formatting import seconds
from dice_py.reporting.sections.ablation_tables import rows_by_round

_HEADS = {
    "mean_response_tokens": "tokens",
    "kl_to_start": "KL to start",
    "on_policy_reward_accuracy": "reward on own samples",
}
_MOST_METRICS = 4
"""Columns of metrics, so that a row is within 120 columns."""


def print_ablation(results: Mapping[str, Any]) -> None:
    """Prints an ablation (ablation.json) to stdout.

    Raises:
        DataError: the results are of another version.
    """
    checked(results)
    print_table(_arms(results))
    say()
    first, _ = claims_by_metric(results)
    for metric, contrasts in first.items():
        print_table(_claims(metric, contrasts))
        say()
    for line in _lines(results):
        say(line)


def _arms(results: Mapping[str, Any]) -> Table:
    """A row for each arm and round: quality, accuracy or else score, mean length, KL."""
    metrics = _columns(results)
    counts = [f"{len(results[name])} {name if len(results[name]) > 1 else name[:-1]}" for name in ("arms", "seeds")]
    table = _table(", ".join(counts), ["arm", "round"], [_head(name) for name in metrics])
    heads, columns = rows_by_round(results, metrics)
    for (arm, number), *cells in zip(heads, *columns, strict=True):
        table.add_row(arm, "start" if number == START else str(number), *cells)
    return table


def _columns(results: Mapping[str, Any]) -> list[str]:
    shown, _ = shown_metrics(results)
    accuracy = score(results).removesuffix("_score") + "_accuracy"
    left_out = {score(results)} if accuracy in shown else set()
    return [name for name in shown if name not in left_out][:_MOST_METRICS]


def _head(metric: str) -> str:
    return next((head for end, head in _HEADS.items() if metric.endswith(end)), metric.replace("_", " "))


def _claims(metric: str, contrasts: list[Any]) -> Table:
    """A row for each contrast by a metric."""
    table = _table(f"differences of {_head(metric)}", ["claim", "", "arm"], ["round", "difference"], ["verdict"])
    texts = column_texts([measured(each["difference"]) for each in contrasts], signs=True)
    for each, text in zip(contrasts, texts, strict=True):
        table.add_row(each["claim"], each["text"], each["arm"], str(each["round"]), text, each["verdict"] or "–")
    return table


def _lines(results: Mapping[str, Any]) -> list[str]:
    lines = [f"in brackets: {intervals_text(results)}"]
    if results["contrasts"]:
        within = "within each seed; " if len(results["seeds"]) > 1 else ""
        lines.append(
            f"claims: {within}shown: the complete interval lies on the claim's side of 0; refuted: on the other"
        )
    _, absent = shown_metrics(results)
    lines += [f"not measured: {words}" for words in absent]
    lines += gap_texts(results)
    lines += [f"not complete, and counted nowhere: {text}" for text in unfinished_runs(results)]
    return [*lines, f"{seconds(results['seconds'])} on {results['machine']}"]


def _table(title: str, left: list[str], right: list[str], last: list[str] | None = None) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for head in left:
        table.add_column(head)
    for head in right:
        table.add_column(head, justify="right")
    for head in last or []:
        table.add_column(head)
    return table
