"""Means with 95 % intervals over seeds, and differences that are paired within the seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

Value: TypeAlias = dict[str, Any]
"""`mean`; `ci95`, [low, high] or None; `by_seed`, in the order of the seeds."""
Verdict: TypeAlias = Literal["shown", "refuted", "open"]


def over_seeds(values: Sequence[float], ci95: list[float] | None = None) -> Value:
    """The mean over seeds with its interval of Student's t with n − 1 degrees of freedom.

    Seeds are few, so the interval supposes that their values are normally distributed; with five of them it is 2.78
    standard errors to each side.

    Args:
        values: one for each seed; at least one.
        ci95: the interval where there is one seed alone: over prompts, from the run itself.
    """
    mean = sum(values) / len(values)
    if len(values) == 1:
        return {"mean": mean, "ci95": ci95, "by_seed": list(values)}
    # Here, so that commands that need no statistics start without SciPy.
    from scipy.stats import t

    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = float(t.ppf(0.975, len(values) - 1)) * (variance / len(values)) ** 0.5
    return {"mean": mean, "ci95": [mean - half, mean + half], "by_seed": list(values)}


def verdict(difference: Value, direction: int) -> Verdict | None:
    """What an interval says of a claim: shown, refuted, or open where it has both signs.

    Args:
        direction: 1 if the claim is that the difference is above zero, −1 below it, 0: there is no claim.
    """
    interval = difference["ci95"]
    if direction == 0:
        return None
    if interval is None:
        return "open"
    low, high = sorted(direction * end for end in interval)
    return "shown" if low > 0 else "refuted" if high < 0 else "open"
