"""Intervals over seeds, and the differences that an ablation's claims rest on."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from dice_py.ablation.arms import make_arms
from dice_py.ablation.claims import LENGTH, contrasts
from dice_py.ablation.statistics import Value, over_seeds, verdict
from dice_py.config.loading import resolve

BASE = resolve()


@pytest.mark.parametrize("count", [2, 3, 5, 12])
def test_the_interval_is_that_of_scipys_test(count: int) -> None:
    values = np.random.default_rng(count).normal(0.5, 0.1, count)
    found = over_seeds(values.tolist())
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert found["mean"] == pytest.approx(values.mean())
    assert found["ci95"] == pytest.approx(list(expected))
    assert found["by_seed"] == values.tolist()


def test_of_one_seed_the_interval_is_the_given_one() -> None:
    assert over_seeds([0.4], [0.3, 0.5]) == {"mean": 0.4, "ci95": [0.3, 0.5], "by_seed": [0.4]}
    assert over_seeds([0.4])["ci95"] is None


@pytest.mark.parametrize(
    ("interval", "direction", "expected"),
    [
        ([0.01, 0.2], 1, "shown"),
        ([-0.2, -0.01], 1, "refuted"),
        ([-0.2, 0.01], 1, "open"),
        ([-0.2, -0.01], -1, "shown"),
        ([0.01, 0.2], -1, "refuted"),
        ([0.01, 0.2], 0, None),
        (None, 1, "open"),
        ([0.0, 0.2], 1, "open"),
    ],
)
def test_verdicts(interval: list[float] | None, direction: int, expected: str | None) -> None:
    assert verdict({"mean": 0.1, "ci95": interval, "by_seed": []}, direction) == expected


def _always(value: float) -> Value:
    return over_seeds([value, value + 0.001])


def test_every_claim_has_its_comparisons() -> None:
    arms = make_arms(BASE, ["neither", "length", "replay", "both"])
    found = contrasts(arms, 2, ["oracle_win_rate"], lambda *_: _always(0.1))
    places = [(one["claim"], one["arm"], one["round"], one["against_arm"], one["against_round"]) for one in found]
    rounds = [("rounds", arm.name, number, arm.name, number - 1) for arm in arms for number in (1, 2)]
    pairs = {
        "length": [("length", "neither"), ("both", "replay")],
        "replay": [("replay", "neither"), ("both", "length")],
    }
    between = [
        (claim, arm, number, other, number)
        for claim, names in pairs.items()
        for arm, other in names
        for number in (1, 2)
    ]
    assert places == [*rounds, *between]
    assert {one["verdict"] for one in found} == {"shown"}


def test_mpo_is_compared_with_dpo_and_with_its_first_stage() -> None:
    arms = make_arms(BASE, ["both", "mpo", "mpo-stage1"])
    found = [one for one in contrasts(arms, 1, ["oracle_win_rate"], lambda *_: _always(0.1)) if one["claim"] == "mpo"]
    assert [(one["arm"], one["against_arm"]) for one in found] == [("mpo", "both"), ("mpo", "mpo-stage1")]
    assert [one["text"] for one in found] == [
        "MPO − another training (DPO on all pairs)", "MPO − another training (stage 1 alone)"
    ]  # fmt: skip


def test_the_penalty_claims_fewer_tokens_and_a_round_claims_nothing_of_them() -> None:
    arms = make_arms(BASE, ["neither", "length"])
    found = contrasts(arms, 1, [LENGTH], lambda *_: _always(-0.5))
    assert [(one["claim"], one["verdict"]) for one in found] == [
        ("rounds", None),
        ("rounds", None),
        ("length", "shown"),
    ]


def test_variants_are_compared_with_the_first_of_them_and_with_their_own_counterpart() -> None:
    arms = make_arms(BASE, ["neither", "length"], ["linear", "bucket"], ["dpo", "sppo"])
    found = contrasts(arms, 1, ["oracle_win_rate"], lambda *_: _always(0.1))
    places = {(one["claim"], one["arm"], one["against_arm"]) for one in found if one["claim"] != "rounds"}
    assert places == {
        ("length", "length-linear-dpo", "neither-dpo"),
        ("length", "length-linear-sppo", "neither-sppo"),
        ("length", "length-bucket-dpo", "neither-dpo"),
        ("length", "length-bucket-sppo", "neither-sppo"),
        ("debias", "length-bucket-dpo", "length-linear-dpo"),
        ("debias", "length-bucket-sppo", "length-linear-sppo"),
        ("method", "neither-sppo", "neither-dpo"),
        ("method", "length-linear-sppo", "length-linear-dpo"),
        ("method", "length-bucket-sppo", "length-bucket-dpo"),
    }


def test_what_has_no_value_is_left_out() -> None:
    arms = make_arms(BASE, ["length"])
    assert contrasts(arms, 1, ["oracle_win_rate"], lambda *_: None) == []
