"""The sections `rounds`, for which a number alone may stand, and `warnings`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from own_config import OWN, refused

from dice_py.config.loading import dump, load_resolved, reassigned, resolve
from dice_py.config.rounds import ROUND_METRICS, RoundsConfig, WarningsConfig
from dice_py.config.run import RunConfig
from dice_py.runs.stored_config import settings
from dice_py.stages.preflight import PreflightJob


def test_a_number_stands_for_the_count_and_leaves_the_rest(yaml_file: Any) -> None:
    short = yaml_file("rounds: 4\n", "short.yaml")
    full = yaml_file("rounds: {count: 5, keep: best}\n", "full.yaml")
    best = RoundsConfig(count=4, keep="best")
    assert resolve([short]).rounds == RoundsConfig(count=4)
    assert resolve([full, short]).rounds == best
    assert resolve([short, full]).rounds == RoundsConfig(count=5, keep="best")
    assert resolve([full], [], {"rounds": 4}).rounds == best  # --rounds 4
    assert resolve([full], ["rounds=4"]).rounds == best
    assert resolve([short], ["rounds.keep=best"]).rounds == best
    assert resolve([], ["rounds.keep=best", "rounds=3", "rounds.count=4"]).rounds == best
    assert reassigned(resolve([full]), ["rounds=4"]).rounds == best  # a resume


def test_a_stored_config_with_a_number(tmp_path: Path) -> None:
    config = resolve([], ["rounds=3"])
    stored = config.model_dump(mode="json")
    known = {"count": 3, "keep": "last", "stop_when": "none", "metric": None, "grace_seconds": 20.0}
    known |= {"keep_models": "all", "keep_samples": True}
    assert stored["rounds"] == known
    older = RunConfig.model_validate(stored | {"rounds": 3})
    assert older == config
    assert settings(older) == settings(config)
    (tmp_path / "config.yaml").write_text(dump(config).replace(dump(config).split("seed:")[0], "rounds: 3\n"))
    assert load_resolved(tmp_path / "config.yaml") == config
    assert resolve([], ["rounds.count=3"]) == config


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["rounds=0"], "rounds.count: Input should be greater than or equal to 1 (got 0)"),
        (["rounds=many"], "rounds.count: Input should be a valid integer"),
        (["rounds="], "rounds.count: Input should be a valid integer"),
        (["rounds.kep=best"], "unknown key 'rounds.kep'; did you mean 'rounds.keep'?"),
        (["rounds.stop_when=better"], "rounds.stop_when: Input should be 'none' or 'worse' (got 'better')"),
        (["warnings.cut_off=0.2"], "unknown key 'warnings.cut_off'; did you mean 'warnings.cut_off_share'?"),
        (["warnings.cut_off_share=-1"], "warnings.cut_off_share: Input should be greater than or equal to 0 (got -1)"),
    ],
)
def test_what_is_refused(assignments: list[str], message: str) -> None:
    assert message in refused(*assignments)


def test_an_unknown_metric_is_refused_with_the_known_ones() -> None:
    message = refused("rounds.metric=accuracy")
    assert all(f"'{name}'" in message for name in ROUND_METRICS)


OWN_SETTINGS = [f"{section}.{key}={value}" for section, keys in OWN.items() for key, value in keys.items()]


@pytest.mark.parametrize(
    ("assignments", "why", "known"),
    [
        (["rounds.metric=oracle_score", "evaluate.prompts=0"], "evaluate.prompts is 0", "implicit_reward_accuracy"),
        (["rounds.keep=best", "evaluate.prompts=0"], "rounds.metric is oracle_win_rate", "implicit_reward_accuracy"),
        (["rounds.metric=implicit_reward_accuracy", "evaluate.pairs=0"], "evaluate.pairs is 0", "oracle_win_rate"),
        (
            [*OWN_SETTINGS, "rounds.metric=oracle_accuracy"],
            "only the synthetic world has an oracle",
            "implicit_reward_accuracy, implicit_reward_accuracy_initial_reference",
        ),
        (
            [*OWN_SETTINGS, "data.replay=", "replay.gamma=0", "rounds.stop_when=worse"],
            "no offline pairs are given: name data.eval_pairs",
            "none",
        ),
    ],
)
def test_a_metric_that_is_not_measured_is_refused_with_those_that_are(
    assignments: list[str], why: str, known: str
) -> None:
    message = refused(*assignments)
    assert why in message
    assert f"It measures: {known}" in message
    without = [one for one in assignments if not one.startswith("rounds.")]
    assert resolve([], without).round_metric is None  # it is not needed where nothing is compared


def test_the_metric_that_is_compared_by_default() -> None:
    assert resolve([], ["rounds.keep=best"]).round_metric == "oracle_win_rate"
    own = resolve([], [*OWN_SETTINGS, "rounds.stop_when=worse"])
    assert own.round_metric == "implicit_reward_accuracy_initial_reference"
    assert resolve([], ["rounds.metric=oracle_score"]).round_metric == "oracle_score"


def test_none_and_null_switch_a_warning_off() -> None:
    limits = resolve([], ["warnings.cut_off_share=none", "warnings.no_pair_share=null"]).warnings
    assert limits == WarningsConfig(
        cut_off_share=None, no_pair_share=None, duplicate_share=None
    )  # the last: the world's
    assert resolve([], ["warnings.cut_off_share=0"]).warnings.cut_off_share == 0.0


def test_neither_section_decides_what_is_checked_first(llama: Path) -> None:
    """Models and data are not checked again where a limit changes; the number of rounds is as it was in the key."""

    def job(*assignments: str) -> PreflightJob:
        return PreflightJob(resolve([], assignments), policy=llama, reference=llama, prompts=[], pairs=[], data_key="k")

    fields = job().key_fields()
    assert fields["config"]["rounds"] == 2
    changed = job("rounds.keep=best", "rounds.stop_when=worse", "warnings.cut_off_share=0.5")
    assert changed.key_fields() == fields
    assert job("rounds=3").key_fields() != fields
