"""The verdict on rewards that are made for it: noise, length, signal, both, and labels that are swapped."""

from __future__ import annotations

import numpy as np
import pytest
from audit_data import pairs, scored

from dice_py.errors import DataError
from dice_py.evaluation.audit.choices import Choice, Form, Reward
from dice_py.evaluation.audit.data import AuditData
from dice_py.evaluation.audit.report import audit

COUNT = 400
SUM: Form = "sum"


def verdict(data: AuditData, rewards: np.ndarray) -> tuple[str, str]:
    entry = audit(data, [Reward(Choice("previous", SUM), rewards, None)], "previous, sum", 0).figures
    assert entry["verdict"] == entry["choices"][0]["verdict"]
    return entry["verdict"], entry["reason"]


def lengths(rng: np.random.Generator, longer: float = 0.5) -> tuple[list[int], list[int]]:
    """Lengths of better and worse responses; the better one is the longer with this probability."""
    both = np.sort(rng.choice(200, size=(COUNT, 2)) + 1, axis=1)
    both[:, 1] += both[:, 0] == both[:, 1]
    is_longer = rng.random(COUNT) < longer
    return np.where(is_longer, both[:, 1], both[:, 0]).tolist(), np.where(is_longer, both[:, 0], both[:, 1]).tolist()


def signal(rng: np.random.Generator, strength: float) -> np.ndarray:
    """A reward of noise, plus `strength` for better responses."""
    return rng.normal(size=2 * COUNT) + np.tile([strength, 0.0], COUNT)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("longer", [0.5, 0.8])
def test_verdicts_on_pairs(seed: int, longer: float) -> None:
    rng = np.random.default_rng(seed)
    data = pairs(*lengths(rng, longer))
    length = data.tokens / 50.0
    assert verdict(data, signal(rng, 0.0))[0] == "at chance"
    assert verdict(data, signal(rng, 1.5))[0] == "usable"
    of_length = verdict(data, length)
    assert of_length[0] == ("at chance" if longer == 0.5 else "length-biased")
    assert verdict(data, length + 0.3 * signal(rng, 1.0))[0] == "length-biased"
    assert verdict(data, 0.1 * length + signal(rng, 2.0))[0] == "usable"
    swapped = verdict(data, -signal(rng, 1.5))
    assert swapped[0] == "at chance"
    assert "below one half: are policy and reference swapped, or the labels?" in swapped[1]


def test_a_reward_for_shortness_is_a_bias_too() -> None:
    rng = np.random.default_rng(5)
    data = pairs(*lengths(rng, longer=0.2))
    said = verdict(data, -data.tokens / 50.0 + 0.2 * signal(rng, 1.0))
    assert said[0] == "length-biased"
    assert "where the better response is the longer one" in said[1]


def test_where_the_better_is_always_longer_the_reward_must_beat_length() -> None:
    rng = np.random.default_rng(2)
    data = pairs(*lengths(rng, longer=1.0))
    said = verdict(data, signal(rng, 1.5))
    assert said[0] == "length-biased"
    assert "than length alone" in said[1]
    # Length says nothing where all are equal: then it is enough to beat one half.
    assert verdict(pairs([7] * COUNT, [7] * COUNT), signal(rng, 1.0))[0] == "usable"
    assert verdict(pairs([7] * COUNT, [7] * COUNT), np.zeros(2 * COUNT))[0] == "at chance"


def test_few_pairs_say_nothing() -> None:
    rng = np.random.default_rng(0)
    data = pairs([5, 9, 4, 8], [6, 3, 5, 2])
    assert verdict(data, rng.normal(size=8))[0] == "at chance"
    assert verdict(pairs([5], [6]), np.array([2.0, 1.0]))[0] == "at chance"  # one of one: Wilson's interval


def test_verdicts_on_scored_sets() -> None:
    rng = np.random.default_rng(1)
    prompt = np.repeat(np.arange(80), 6)
    score = rng.integers(0, 2, 480).astype(float)
    tokens = rng.integers(1, 60, 480) + 30 * score.astype(int)
    data = scored(prompt.tolist(), score.tolist(), tokens.tolist())
    assert verdict(data, rng.normal(size=480))[0] == "at chance"
    assert verdict(data, tokens.astype(float))[0] == "length-biased"
    assert verdict(data, score + rng.normal(size=480))[0] == "usable"
    with pytest.raises(DataError, match="nothing to measure a reward by"):
        verdict(scored([0, 0, 1, 1], [1.0, 1.0, 0.5, 0.5]), np.zeros(4))


def test_figures_are_complete_and_absent_ones_have_a_reason() -> None:
    rng = np.random.default_rng(4)
    of_pairs = pairs(*lengths(rng))
    prompt, score = np.repeat(np.arange(40), 5).tolist(), rng.integers(0, 2, 200).astype(float).tolist()
    model = list(range(5)) * 40
    cases = {
        "pairs": (of_pairs, {"accuracy", "length_balanced_accuracy", "brier", "accuracy_over_length"}),
        "scored": (
            scored(prompt, [0.3 + one / 2 for one in score], rng.integers(1, 9, 200).tolist()),
            {"accuracy", "length_balanced_accuracy", "brier", "accuracy_over_length", "end_score", "max_score", "loss",
             "prompt_pearson"},
        ),
        "verifiable": (
            scored(prompt, score, rng.integers(1, 9, 200).tolist(), model),
            {"accuracy", "length_balanced_accuracy", "brier", "accuracy_over_length", "end_score", "max_score", "loss",
             "prompt_pearson", "roc_auc", "row_wise_pearson", "separability", "kendall_tau", "spearman", "rank_brier"},
        ),
    }  # fmt: skip
    for name, (data, expected) in cases.items():
        rewards = rng.normal(size=len(data.prompt))
        figures = audit(data, [Reward(Choice("previous", SUM), rewards, None)], "previous, sum", 0).figures
        metrics = figures["choices"][0]["metrics"]
        known = {metric for metric, figure in metrics.items() if figure["value"] is not None}
        assert known - {"confidence_agreement"} == expected, name
        assert metrics.keys() - known <= figures["reasons"].keys()
        absent_of_length = {m for m, figure in figures["length_alone"]["metrics"].items() if figure["value"] is None}
        assert absent_of_length <= figures["reasons"].keys()
        assert "brier" in absent_of_length
