"""Results of ablations that nobody ran: the form of ablation.json, with made-up numbers."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from typing import Any

_ARMS = {
    "neither": ("without penalty and replay", "none", 0.0),
    "length": ("length penalty (linear)", "linear", 0.0),
    "replay": ("replay", "none", 0.3),
    "both": ("length penalty (linear) and replay", "linear", 0.3),
}
_T = {1: None, 2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}
"""Quantiles of the t-distribution for a 95 % interval, by number of seeds."""


def value(by_seed: Sequence[float], spread: float | None = None) -> dict[str, Any]:
    """A value with its t-interval; of one seed with one of ± `spread`, if that is given."""
    mean = statistics.fmean(by_seed)
    quantile = _T[len(by_seed)]
    half = spread if quantile is None else quantile * statistics.stdev(by_seed) / len(by_seed) ** 0.5
    interval = None if half is None else [mean - half, mean + half]
    return {"mean": mean, "ci95": interval, "by_seed": list(by_seed)}


def made_arm(
    name: str, label: str, settings: dict[str, Any], seeds: Sequence[int], rounds: int, gain: float = 0.02
) -> dict[str, Any]:
    """An arm that gains `gain` of win rate a round."""
    draw = random.Random(ascii(name))

    def drawn(mean: float, spread: float) -> dict[str, Any]:
        return value([draw.gauss(mean, spread) for _ in seeds], spread)

    return {
        "arm": name,
        "label": label,
        "settings": settings,
        "seeds": list(seeds),
        "start": {
            "oracle_accuracy": drawn(0.6, 0.01), "oracle_score": drawn(0.55, 0.01),
            "mean_response_tokens": drawn(6, 0.05),
        },
        "rounds": [
            {
                "round": number,
                "metrics": {
                    "oracle_win_rate": drawn(0.5 + gain * number, 0.01),
                    "oracle_accuracy": drawn(0.6 + gain * number, 0.01),
                    "oracle_score": drawn(0.55 + gain * number, 0.01),
                    "mean_response_tokens": drawn(6 + 0.2 * number, 0.05),
                    "kl_to_start": drawn(0.5 * number, 0.03),
                    "on_policy_reward_accuracy": drawn(0.5 - 0.05 * number, 0.02),
                    "distinct_2": drawn(0.3, 0.01),
                },
                "mining": {
                    "alpha": drawn(0.2, 0.01), "mean_length_gap_before": drawn(0.6, 0.05),
                    "mean_length_gap_after": drawn(0, 0.01), "pairs": drawn(600, 1),
                },
            }
            for number in range(1, rounds + 1)
        ],
    }  # fmt: skip


def contrast(claim: str, text: str, arm: str, against: str, difference: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The difference of two arms after round 2; the verdict follows from its interval."""
    low, high = difference["ci95"] or (-1, 1)
    verdict = "shown" if low > 0 else "refuted" if high < 0 else "open"
    return {
        "claim": claim, "text": text, "arm": arm, "round": 2, "against_arm": against, "against_round": 2,
        "metric": "oracle_win_rate", "difference": difference, "verdict": verdict, **more,
    }  # fmt: skip


def made_results(seeds: Sequence[int] = (3, 4, 5, 6, 7), rounds: int = 2, **changes: Any) -> dict[str, Any]:
    """Four arms on the world."""
    some = [0.01 * (n + 2) for n in range(len(seeds))]
    arms = [
        made_arm(name, label, {"mine.debias": debias, "replay.gamma": gamma}, seeds, rounds)
        for name, (label, debias, gamma) in _ARMS.items()
    ]
    return {
        "version": 1,
        "rounds": rounds,
        "seeds": list(seeds),
        "interval": "seeds" if len(seeds) > 1 else "prompts",
        "is_world": True,
        "settings": {"generate.samples": 8, "evaluate.prompts": 200},
        "quality": "oracle_win_rate",
        "arms": arms,
        "contrasts": [
            contrast("rounds", "round 2 − round 1 (both)", "both", "both", value(some, 0.01), against_round=1),
            contrast("length", "with the length penalty − without it (replay in both)", "both", "replay",
                     value([-each for each in some], 0.01)),
            contrast("replay", "with replay − without it (the length penalty in both)", "both", "length",
                     value([(-1) ** n * each for n, each in enumerate(some)], 0.04)),
        ],
        "unfinished": [],
        "seconds": 512.0,
        "machine": "2 cores, a processor",
        "versions": {"dice": "0.2.0", "torch": "2.13.0"},
        **changes,
    }  # fmt: skip


def many_arms(count: int, seeds: Sequence[int] = (3, 4, 5), rounds: int = 3) -> dict[str, Any]:
    """Results of more arms than one plot can tell apart."""
    debias = ("linear", "bucket", "matched")
    arms = [
        made_arm(f"arm-{n}", f"the arm {n}", {"mine.debias": debias[n % 3], "replay.gamma": 0.3, "train.method":
                 ("dpo", "sppo")[n % 2]}, seeds, rounds, 0.005 * n)
        for n in range(count)
    ]  # fmt: skip
    return made_results(seeds, rounds, arms=arms, contrasts=[])
