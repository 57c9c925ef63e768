"""The arms of an ablation: their names, and the configs that they make."""

from __future__ import annotations

import pytest
from own_config import OWN

from dice_py.ablation.arms import ARMS, MATCHED_RATIO, TRAININGS, make_arms
from dice_py.ablation.run import Ablation, shared_settings
from dice_py.config.loading import resolve
from dice_py.errors import UsageError

BASE = resolve()


def test_the_four_arms_differ_in_the_penalty_and_the_replay_alone() -> None:
    arms = make_arms(BASE, [name for name in ARMS if name not in TRAININGS])
    configs = {arm.name: arm.config(BASE, 5) for arm in arms}
    parts = {name: (config.mine.debias, config.replay.gamma) for name, config in configs.items()}
    assert parts == {
        "neither": ("none", 0.0),
        "length": ("linear", 0.0),
        "replay": ("none", BASE.replay.gamma),
        "both": ("linear", BASE.replay.gamma),
    }
    for config in configs.values():
        assert (config.seed, config.world.seed) == (5, 5)
        same = {"mine": BASE.mine, "replay": BASE.replay, "seed": 0, "world": BASE.world}
        assert config.model_copy(update=same) == BASE


def test_the_arms_of_mpo_differ_from_both_in_the_training_alone() -> None:
    arms = make_arms(BASE, ["both", *TRAININGS])
    assert [arm.name for arm in arms] == ["both", "mpo", "mpo-stage1"]
    assert [arm.label for arm in arms[1:]] == ["MPO", "MPO, stage 1 alone"]
    both, mpo, first = (arm.config(BASE, 5) for arm in arms)
    assert (mpo.train.method, mpo.train.mpo.steps, first.train.method, first.train.mpo.steps) == (
        "mpo",
        "auto",
        "mpo",
        0,
    )
    assert mpo.mine.difficulty_quantile == 0.5
    assert mpo.model_copy(update={"train": both.train, "mine": both.mine}) == both
    assert first.train.model_copy(update={"mpo": mpo.train.mpo}) == mpo.train
    with pytest.raises(UsageError, match="the arm mpo has a training method of its own: leave it or --methods out"):
        make_arms(BASE, ["both", "mpo"], methods=["dpo"])


def test_arms_without_a_penalty_are_not_crossed_with_ways_of_taking_it_out() -> None:
    arms = make_arms(BASE, ["neither", "both"], ["linear", "bucket", "matched"], ["dpo", "spa"])
    assert [arm.name for arm in arms] == [
        "neither-dpo",
        "neither-spa",
        "both-linear-dpo",
        "both-linear-spa",
        "both-bucket-dpo",
        "both-bucket-spa",
        "both-matched-dpo",
        "both-matched-spa",
    ]
    assert arms[-1].label == "length penalty and replay (matched, spa)"
    configs = [arm.config(BASE, 0) for arm in arms]
    assert [config.train.method for config in configs] == ["dpo", "spa"] * 4
    assert configs[1].reward_reference == "initial"
    assert [config.mine.length_ratio for config in configs] == [None] * 6 + [MATCHED_RATIO] * 2


def test_a_tolerance_of_the_base_config_is_kept_for_matched_alone() -> None:
    base = resolve(assignments=["mine.debias=matched", "mine.length_tolerance=2"])
    neither, both = (arm.config(base, 0) for arm in make_arms(base, ["neither", "both"]))
    assert (neither.mine.debias, neither.mine.length_tolerance) == ("none", None)
    assert (both.mine.debias, both.mine.length_tolerance, both.mine.length_ratio) == ("matched", 2, None)


def test_the_way_of_the_base_config_is_kept() -> None:
    base = resolve(assignments=["mine.debias=per_token"])
    assert [arm.config(base, 0).mine.debias for arm in make_arms(base, ["neither", "both"])] == ["none", "per_token"]


def test_an_arm_that_would_replay_nothing_is_refused() -> None:
    base = resolve(assignments=["replay.gamma=0"])
    with pytest.raises(UsageError, match="the arm both would replay nothing and be a copy of the one without"):
        make_arms(base, ["length", "both"])
    assert [arm.name for arm in make_arms(base, ["neither", "length"])] == ["neither", "length"]


def test_runs_that_may_end_early_are_refused() -> None:
    base = resolve(assignments=["rounds.stop_when=worse"])
    with pytest.raises(UsageError, match=r"rounds\.stop_when ends some runs early"):
        Ablation(base, make_arms(base, ["both"]), (0,))


def test_losses_are_trls_types() -> None:
    arms = make_arms(BASE, ["both"], losses=["sigmoid", "ipo"])
    assert [arm.name for arm in arms] == ["both-sigmoid", "both-ipo"]
    losses = [arm.config(BASE, 0).train.loss for arm in arms]
    assert [[term.type for term in loss or []] for loss in losses] == [["sigmoid"], ["ipo"]]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"names": ["nothing"]}, "there is no arm 'nothing'; there are neither, length, replay, both"),
        ({"names": []}, "no arm is given; there are neither, length, replay, both"),
        ({"names": ["both", "both"]}, "the arm both is given twice; leave one out"),
        ({"names": ["both"], "debiases": ["none"]}, "there is no debias 'none'; there are linear, per_token, bucket"),
        ({"names": ["both"], "methods": ["ppo"]}, "there is no method 'ppo'; there are dpo, rdpo, sppo"),
        ({"names": ["both"], "losses": ["l2"]}, "there is no loss 'l2'; there are sigmoid, hinge"),
    ],
)
def test_wrong_names_are_refused(wrong: dict[str, list[str]], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_arms(BASE, **wrong)
    assert str(caught.value).startswith(message)


def test_settings_that_do_not_go_together_are_refused_with_the_name_of_the_arm() -> None:
    (arm,) = make_arms(BASE, ["neither"], methods=["rdpo"])
    with pytest.raises(UsageError, match=r"^arm neither: config: train\.length_weight is auto"):
        arm.config(BASE, 0)


def test_seeds_count_once() -> None:
    arms = make_arms(BASE, ["both"])
    with pytest.raises(UsageError, match="seed 3 is given twice"):
        Ablation(BASE, arms, (3, 4, 3))
    with pytest.raises(UsageError, match="no seed is given"):
        Ablation(BASE, arms, ())


def test_runs_on_an_own_model_are_not_side_by_side() -> None:
    own = resolve(overrides=OWN)
    with pytest.raises(UsageError, match="--jobs is for the synthetic world"):
        Ablation(own, make_arms(own, ["both"]), (0,), jobs=2)


def test_the_shared_settings_are_those_that_were_set() -> None:
    assert shared_settings(BASE) == {}
    changed = resolve(assignments=["generate.samples=4", "world.sft_steps=7", "rounds.count=3"])
    assert shared_settings(changed) == {"generate.samples": 4, "world.sft_steps": 7}
