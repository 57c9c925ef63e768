"""The claims of an ablation: differences between two arms, or two rounds of one, that are paired within the seed.

rounds    a round against the one before it, in each arm (round 1: against π_1)
length    an arm that takes the length out against the same arm without it
replay    an arm that replays offline pairs against the same arm without them
mpo       MPO against DPO on all pairs, and against its own first stage alone
debias, method, loss    one way against the first that was asked for, in arms that are otherwise the same
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dice_py.ablation.arms import Arm
from dice_py.ablation.statistics import Value, verdict

LENGTH = "mean_response_tokens"
_PAIRS = {
    "length": (("length", "neither", "no replay in both"), ("both", "replay", "replay in both")),
    "replay": (("replay", "neither", "no length penalty in both"), ("both", "length", "length penalty in both")),
    "mpo": (("mpo", "both", "DPO on all pairs"), ("mpo", "mpo-stage1", "stage 1 alone")),
}
_WITH = {
    "length": "with the length penalty − without it",
    "replay": "with replay − without it",
    "mpo": "MPO − another training",
}

Difference = Callable[[str, int, str, int, str], Value | None]
"""Called as (arm, round, against_arm, against_round, metric): the paired difference; None where one has no value.
Round 0 is the start."""


@dataclass(frozen=True)
class _Comparison:
    claim: str
    text: str
    arm: str
    round: int
    against_arm: str
    against_round: int

    def direction(self, metric: str) -> int:
        """The sign of the difference that the claim expects; 0: none. A round may change the length either way."""
        if metric != LENGTH:
            return 1
        return -1 if self.claim == "length" else 0


def contrasts(arms: Sequence[Arm], rounds: int, metrics: Sequence[str], difference: Difference) -> list[dict[str, Any]]:
    """All comparisons, ready for JSON: `claim`, `text`, `arm`, `round`, `against_arm`, `against_round`, `metric`,
    `difference` (a value, statistics.py) and `verdict` ("shown", "refuted", "open"; None where nothing is claimed).

    Args:
        metrics: by which arms are compared.
    """
    found = []
    for comparison in _comparisons(arms, rounds):
        for metric in metrics:
            value = difference(
                comparison.arm, comparison.round, comparison.against_arm, comparison.against_round, metric
            )
            if value is not None:
                said = verdict(value, comparison.direction(metric))
                found.append(vars(comparison) | {"metric": metric, "difference": value, "verdict": said})
    return found


def _comparisons(arms: Sequence[Arm], rounds: int) -> Iterator[_Comparison]:
    numbers = range(1, rounds + 1)
    for arm in arms:
        for number in numbers:
            before = f"round {number - 1}" if number > 1 else "π_1, where the run starts"
            yield _Comparison("rounds", f"round {number} − {before}", arm.name, number, arm.name, number - 1)
    for claim, pairs in _PAIRS.items():
        for kind, against, where in pairs:
            for arm, other in _matching(arms, kind, against):
                text = f"{_WITH[claim]} ({where})"
                yield from (_Comparison(claim, text, arm.name, number, other.name, number) for number in numbers)
    for option in ("debias", "method", "loss"):
        for arm, other in _variants(arms, option):
            text = f"{option} {arm.options[option]} − {other.options[option]}"
            yield from (_Comparison(option, text, arm.name, number, other.name, number) for number in numbers)


def _matching(arms: Sequence[Arm], kind: str, against: str) -> Iterator[tuple[Arm, Arm]]:
    """Arms of two kinds with the same options, as far as the second kind has them."""
    for arm in arms:
        for other in arms:
            shared: Mapping[str, str] = {
                name: value for name, value in arm.options.items() if other.has_penalty or name != "debias"
            }
            if arm.kind == kind and other.kind == against and shared == other.options:
                yield arm, other


def _variants(arms: Sequence[Arm], option: str) -> Iterator[tuple[Arm, Arm]]:
    """Arms that differ in one option alone, each with the first of them."""
    firsts: dict[tuple[Any, ...], Arm] = {}
    for arm in arms:
        if option in arm.options:
            rest = sorted(item for item in arm.options.items() if item[0] != option)
            first = firsts.setdefault((arm.kind, *rest), arm)
            if first is not arm:
                yield arm, first
