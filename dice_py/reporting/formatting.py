"""Numbers, durations and mining results as a person reads them."""

from __future__ import annotations

from typing import Any


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
