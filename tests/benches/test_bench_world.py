"""The measurements on the synthetic world: what they compute, on made-up results."""

from __future__ import annotations

from typing import Any

import own_samples
import pytest
import world_search

from dice_py.ablation.arms import make_arms
from dice_py.ablation.statistics import over_seeds
from dice_py.config.loading import resolve


def test_the_accuracy_of_rewards_is_over_pairs_of_a_right_and_a_wrong_answer() -> None:
    prompts = [1, 1, 1, 2, 2, 3]
    right = [True, False, False, False, True, True]
    # Prompt 1: above one wrong answer, and level with the other; prompt 2: below; prompt 3 has no wrong answer.
    rewards = [0.5, 0.1, 0.5, 0.9, 0.2, -4.0]
    assert own_samples.accuracy(prompts, right, rewards) == pytest.approx((1 + 0.5 + 0) / 3)


def test_the_three_rewards_are_the_same_where_policy_and_reference_are() -> None:
    """`frozen` and `initial` have one reference, `initial` and `previous` one policy: what LOSSES compares."""
    (policy, reference), losses = own_samples.REWARDS["initial"], own_samples.LOSSES
    assert (policy, reference) == ("sampled_logp", "initial_ref_logp")
    assert own_samples.REWARDS["previous"] == (policy, "previous_logp")
    assert own_samples.REWARDS["frozen"] == ("start_logp", reference)
    assert losses == {"policy": ("frozen", "initial"), "reference": ("initial", "previous")}


def test_answers_that_are_all_right_judge_no_reward() -> None:
    with pytest.raises(ValueError, match="no prompt has both"):
        own_samples.accuracy([1, 1], [True, True], [0.1, 0.2])


def test_values_are_written_with_their_interval() -> None:
    assert own_samples.text(over_seeds([0.5])) == "0.500"
    assert own_samples.text({"mean": 0.5, "ci95": [0.25, 0.75], "by_seed": [0.5, 0.5]}) == "0.500 (0.250 to 0.750)"


@pytest.mark.parametrize("name", list(world_search.VARIANTS))
def test_every_variant_is_a_config_of_its_own(name: str) -> None:
    base = resolve(assignments=[*world_search.BEGAN, *world_search.VARIANTS[name]])
    configs = [arm.config(base, 0) for arm in make_arms(base, world_search.ARMS)]
    assert len(configs) == 2
    began = resolve(assignments=world_search.BEGAN)
    assert (base == began) == (not world_search.VARIANTS[name])


def test_the_table_has_a_line_for_each_variant() -> None:
    def arm(name: str, accuracies: list[float]) -> dict[str, Any]:
        metrics = [dict.fromkeys(world_search.METRICS, over_seeds([value])) for value in accuracies]
        return {
            "arm": name,
            "start": {"oracle_accuracy": over_seeds([0.4])},
            "rounds": [{"round": number + 1, "metrics": one} for number, one in enumerate(metrics)],
        }

    results = {"arms": [arm("length", [0.5, 0.45]), arm("both", [0.55, 0.6])], "seconds": 1.0}
    name = next(iter(world_search.VARIANTS))
    lines = world_search.table([world_search.row(name, results)]).splitlines()
    assert lines[2] == f"| {name} | 0.400 | 0.500, 0.450 | 0.550, 0.600 | 0.450, 0.600 | 0.55, 0.60 |"
