"""Results of ablations that nobody ran: arms and claims of the driver, with made-up numbers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from dice_py.ablation.arms import Arm, make_arms
from dice_py.ablation.claims import LENGTH, contrasts
from dice_py.ablation.statistics import Value, over_seeds
from dice_py.config.loading import resolve

SEEDS = (3, 4, 5, 6, 7)
NAMES = ("neither", "length", "replay", "both")
# Of metrics by arm and round: the start, what a round adds, what the penalty adds to that, and the spread of seeds.
_NUMBERS = {
    "oracle_win_rate": (0.5, 0.01, 0.02, 0.004),
    "oracle_accuracy": (0.6, 0.01, 0.02, 0.01),
    "oracle_score": (0.55, 0.01, 0.02, 0.01),
    LENGTH: (6.0, 0.5, -0.4, 0.05),
    "kl_to_start": (0.0, 0.5, 0.0, 0.03),
    "on_policy_reward_accuracy": (0.5, -0.05, 0.0, 0.02),
    "distinct_2": (0.3, 0.0, 0.0, 0.01),
}
_MINED = {"pairs": 600.0, "alpha": 0.2, "mean_length_gap_before": 0.6, "mean_length_gap_after": 0.0}
_STARTS = ("oracle_win_rate", "oracle_accuracy", "oracle_score", LENGTH, "kl_to_start")


def _number(metric: str, arm: Arm, number: int, seed: int) -> float:
    start, gain, of_penalty, spread = _NUMBERS[metric]
    # At the start all arms are one policy, which is as good as itself.
    place = (metric, ascii(arm.name) if number else "", number, seed)
    noise = 0.0 if number == 0 and metric in ("oracle_win_rate", "kl_to_start") else spread
    return start + number * (gain + of_penalty * arm.has_penalty) + random.Random(str(place)).gauss(0, noise)


def _value(metric: str, arm: Arm, number: int, seeds: Sequence[int]) -> Value:
    numbers = [_number(metric, arm, number, seed) for seed in seeds]
    return over_seeds(numbers, [numbers[0] - 0.01, numbers[0] + 0.01])


def made_arm(arm: Arm, seeds: Sequence[int], rounds: int) -> dict[str, Any]:
    """An arm as ablation.json has it."""
    found: dict[str, Any] = {"start": {}, "rounds": []}
    if seeds:
        found["start"] = {metric: _value(metric, arm, 0, seeds) for metric in _STARTS}
        found["rounds"] = [
            {
                "round": number,
                "metrics": {metric: _value(metric, arm, number, seeds) for metric in _NUMBERS},
                "mining": {name: over_seeds([value] * len(seeds)) for name, value in _MINED.items()},
            }
            for number in range(1, rounds + 1)
        ]
    return {"arm": arm.name, "label": arm.label, "settings": arm.settings, "seeds": list(seeds), **found}


def made_results(
    seeds: Sequence[int] = SEEDS,
    rounds: int = 2,
    *,
    arms: Sequence[Arm] | None = None,
    unfinished: Sequence[tuple[str, int]] = (),
    **changes: Any,
) -> dict[str, Any]:
    """Results on the world.

    Args:
        arms: None: the four.
        unfinished: arms and seeds of runs that are not complete.
        changes: other values of entries.
    """
    arms = make_arms(resolve(), NAMES) if arms is None else arms
    done = {arm.name: [seed for seed in seeds if (arm.name, seed) not in unfinished] for arm in arms}
    by_name = {arm.name: arm for arm in arms}

    def difference(arm: str, number: int, other: str, other_number: int, metric: str) -> Value | None:
        shared = [seed for seed in done[arm] if seed in done[other]]
        ends = [(_number(metric, by_name[arm], number, s), _number(metric, by_name[other], other_number, s))
                for s in shared]  # fmt: skip
        numbers = [after - before for after, before in ends]
        return over_seeds(numbers, [numbers[0] - 0.01, numbers[0] + 0.01]) if numbers else None

    return {
        "version": 1,
        "rounds": rounds,
        "seeds": list(seeds),
        "interval": "seeds" if len(seeds) > 1 else "prompts",
        "is_world": True,
        "settings": {"generate.samples": 8, "evaluate.prompts": 200},
        "quality": "oracle_win_rate",
        "arms": [made_arm(arm, done[arm.name], rounds) for arm in arms],
        "contrasts": contrasts(arms, rounds, ["oracle_win_rate", "oracle_score", LENGTH], difference),
        "unfinished": [f"{arm}/seed-{seed}" for arm, seed in unfinished],
        "seconds": 512.0,
        "machine": "2 processor cores, made up",
        "versions": {"dice-align": "0.2.0", "torch": "2.13.0"},
        **changes,
    }


def many_arms(seeds: Sequence[int] = (3, 4, 5), rounds: int = 3) -> dict[str, Any]:
    """Results of twelve arms: more than one plot can tell apart."""
    arms = make_arms(resolve(), NAMES, ("linear", "bucket"), ("dpo", "sppo"))
    assert len(arms) == 12
    return made_results(seeds, rounds, arms=arms)


def arms_called(names: Sequence[str]) -> tuple[Arm, ...]:
    """Arms of any names, which are equal but for these."""
    return tuple(Arm(name, "both", settings={"mine.debias": "linear"}) for name in names)
