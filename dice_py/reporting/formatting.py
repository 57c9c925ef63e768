"""Numbers, durations and mining results as a person reads them."""

from __future__ import annotations

import re
from typing import Any


def number(value: Any) -> str:
    """A number as a person reads it: integers with thousands separators, others to four significant digits."""
    if value is None:
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, list):
        return " to ".join(number(item) for item in value)
    if isinstance(value, dict):
        # A count of zero is left out; a measure of zero is not.
        parts = [f"{name} {number(item)}" for name, item in value.items() if item or isinstance(item, bool | float)]
        return ", ".join(parts) or "none"
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


_INTERVAL = "_ci95"
_GROUPS = (
    r".*win_rate",
    r"(start_)?(oracle_|\w+_score)",
    r"(start_)?implicit_reward|length_only|worst_slice|(\w+_)?on_policy_reward|reward_length",
    r"kl_",
    r"entropy|distinct|duplicate|cut_off",
    r"(start_)?mean_response",
    r".*_drift",
)
"""Of metrics of an evaluation, in the order in which they are shown; those of a benchmark and others come after."""
_NOTES = ("kl_and_entropy",)
"""Metrics that are sentences: shown below the table."""
_WARNED = ("judge_failures",)
"""Shown as warnings (runs/warnings.py)."""


def evaluation_rows(metrics: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The metrics of rounds side by side: a row for each metric, its name and a text for each round.

    A value with an interval is one text: "0.53 (0.5 to 0.56)".

    Args:
        metrics: by round, as the evaluate stage writes them.
    """

    def group(name: str) -> int:
        return next((n for n, pattern in enumerate(_GROUPS) if re.match(pattern, name)), len(_GROUPS))

    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    shown = [
        name
        for name in names
        if name not in (*_NOTES, *_WARNED) and name.removesuffix(_INTERVAL) not in names[: names.index(name)]
    ]
    return [
        [name.replace("_", " "), *(_with_interval(values, name) for values in metrics.values())]
        for name in sorted(shown, key=group)
    ]


def evaluation_notes(metrics: dict[str, dict[str, Any]]) -> list[str]:
    """The sentences among the metrics of rounds, each once."""
    return list(dict.fromkeys(str(values[name]) for values in metrics.values() for name in _NOTES if name in values))


def _with_interval(values: dict[str, Any], name: str) -> str:
    value, interval = values.get(name), values.get(name + _INTERVAL)
    if isinstance(value, dict) and "ci95" in value:
        return (
            f"{number(value['accuracy'])} ({number(value['ci95'])}), {value['slice']}, {number(value['pairs'])} pairs"
        )
    return number(value) if interval is None else f"{number(value)} ({number(interval)})"


def mining_rows(summary: dict[str, Any]) -> list[list[str]]:
    """A summary of mining (`MinedPairs.summary`, or `mining.json`), as rows of a name and a text.

    Counts of zero, options that are off and fields that an older version did not write are left out.
    """

    def change(name: str) -> str:
        return f"{number(summary[f'{name}_before'])} before, {number(summary[f'{name}_after'])} after"

    of = f"of {number(summary['prompts'])} prompts with {number(summary['rows'])} responses"
    rows = [["pairs", f"{number(summary['pairs'])} ({of})"]]
    rows += [[name, summary[name]] for name in ("debias", "pairing") if name in summary]
    if "pooled_rounds" in summary:
        pooled = summary["pooled_rounds"]
        rows.append(["candidates of rounds", number([pooled[0], pooled[-1]] if len(pooled) > 1 else pooled)])
    if summary["alpha"] is not None:
        interval = f"the same pairs from {_alpha(summary['alpha_low'])} to {_alpha(summary['alpha_high'])}"
        rows.append(["alpha", f"{_alpha(summary['alpha'])} ({interval})"])
    rows.append(["mean length gap", change("mean_length_gap")])
    if "reward_length_correlation_before" in summary:
        rows.append(["correlation of reward and length", change("reward_length_correlation")])
        rows.append(["chosen is the longer", share(summary["chosen_longer_share"])])
        rows.append(["margins", quantiles(summary["margin_quantiles"])])
        if summary["mean_consistency"] is not None:
            rows.append(["mean consistency", number(summary["mean_consistency"])])
    dropped = [("rows", "dropped"), ("prompts", "dropped_prompts"), ("pairs", "dropped_pairs")]
    for what, name in dropped:
        if any(summary.get(name, {}).values()):
            rows.append([f"dropped {what}", number(summary[name]).replace("_", " ")])
    return rows


def _alpha(value: float | None) -> str:
    # Six digits, since the interval is narrow where there are many prompts. JSON has null for infinity.
    return "infinity" if value is None else f"{value:.6g}"


def share(value: float | None) -> str:
    """A share from 0 to 1 as a percentage."""
    return "–" if value is None else f"{100 * value:.1f} %"


def quantiles(values: dict[str, float | None]) -> str:
    """Quantiles named "min", "0.05", "max" and so on, as a person reads them; – where there are none."""
    if None in values.values():
        return "–"

    def name(key: str) -> str:
        return key if key in ("min", "max") else f"{100 * float(key):g} %"

    return ", ".join(f"{name(key)}: {number(value)}" for key, value in values.items())
