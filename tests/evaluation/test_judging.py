"""Win rates of judges against the start and the round before, and the metrics of held-out pairs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import polars as pl
import pytest

from dice_py.errors import DataError
from dice_py.evaluation.comparison import win_rates, win_rates_of_scores
from dice_py.evaluation.judges.base import PairwiseJudge, ScoringJudge
from dice_py.evaluation.judges.oracle import OracleJudge
from dice_py.evaluation.judging import PolicySamples, judge_metrics
from dice_py.evaluation.metrics import bootstrap_ci95
from dice_py.evaluation.pair_metrics import PairLogps, pair_metrics
from dice_py.evaluation.values import ItemValues
from dice_py.events import Report, no_report
from dice_py.synthetic.task import prompt_messages


@dataclass(frozen=True)
class ByLength(ScoringJudge):
    """Likes long responses."""

    name: ClassVar[str] = "length"
    asked: list[list[str]] = field(default_factory=list)

    def key_fields(self) -> dict[str, Any]:
        return {}

    def scores(self, prompts: pl.DataFrame, samples: pl.DataFrame, report: Report = no_report) -> pl.Series:
        self.asked.append(samples["response"].to_list())
        return samples["response"].str.len_chars().cast(pl.Float64)


@dataclass(frozen=True)
class ByBoth(PairwiseJudge):
    """Is sure by 0.8 that the longer response is better."""

    name: ClassVar[str] = "pairwise"

    def key_fields(self) -> dict[str, Any]:
        return {}

    def preferences(
        self, prompts: pl.DataFrame, ours: pl.DataFrame, theirs: pl.DataFrame, report: Report = no_report
    ) -> pl.Series:
        assert ours["prompt_id"].to_list() == theirs["prompt_id"].to_list()
        gaps = (len(a) - len(b) for a, b in zip(ours["response"], theirs["response"], strict=True))
        return pl.Series([0.8 if gap > 0 else 0.2 if gap < 0 else 0.5 for gap in gaps], dtype=pl.Float64)


def responses(*texts: tuple[int, str]) -> pl.DataFrame:
    return pl.DataFrame(texts, schema={"prompt_id": pl.UInt32, "response": pl.String}, orient="row")


PROMPTS = pl.DataFrame({"prompt_id": [0, 1], "messages": [[{"role": "user", "content": "?"}]] * 2})
OURS = responses((1, "aaa"), (0, "aa"), (0, "a"))
START = responses((0, "a"), (0, "aaaa"), (1, "a"))
PREVIOUS = responses((0, "a"), (1, "aaaa"), (0, "a"))


def test_a_scoring_judge_compares_all_combinations() -> None:
    rates = win_rates(ByLength(), PROMPTS, OURS, START)
    # aa beats a, loses to aaaa; a ties a, loses.
    assert rates.rows() == [(0, pytest.approx(1.5 / 4)), (1, 1.0)]
    scores = [frame["response"].str.len_chars() for frame in (OURS, START)]
    assert win_rates_of_scores(OURS, scores[0], START, scores[1]).equals(rates)


def test_a_pairwise_judge_compares_the_nth_with_the_nth() -> None:
    assert win_rates(ByBoth(), PROMPTS, OURS, START).rows() == [(0, pytest.approx((0.8 + 0.2) / 2)), (1, 0.8)]
    more = pl.concat([OURS, responses((0, "aaaaaaa"), (7, "b"))])  # of which the others have none
    assert win_rates(ByBoth(), PROMPTS, more, START).equals(win_rates(ByBoth(), PROMPTS, OURS, START))


@dataclass(frozen=True)
class Silent(ByBoth):
    """Gives no verdict on responses of one letter."""

    def preferences(
        self, prompts: pl.DataFrame, ours: pl.DataFrame, theirs: pl.DataFrame, report: Report = no_report
    ) -> pl.Series:
        told = super().preferences(prompts, ours, theirs, report)
        return pl.Series([None if text == "a" else value for text, value in zip(ours["response"], told, strict=True)])


def test_no_verdict_is_no_tie() -> None:
    assert win_rates(Silent(), PROMPTS, OURS, START).rows() == [(0, 0.8), (1, 0.8)]
    with pytest.raises(DataError, match="gives no verdict on any prompt"):
        win_rates(Silent(), PROMPTS, responses((0, "a"), (1, "a")), START)


@pytest.mark.parametrize("judge", [ByLength(), ByBoth()], ids=["scoring", "pairwise"])
def test_samples_without_a_common_prompt(judge: Any) -> None:
    with pytest.raises(DataError, match="no prompt in common"):
        win_rates(judge, PROMPTS, OURS, responses((5, "a")))


def metrics_of(judge: Any, previous: pl.DataFrame, values: ItemValues) -> dict[str, Any]:
    samples = PolicySamples(PROMPTS, OURS, START, previous)
    return judge_metrics(judge, samples, pl.Series([0.0] * OURS.height), 0, values)


def test_both_win_rates_with_intervals() -> None:
    values = ItemValues()
    judge = ByLength()
    found = metrics_of(judge, PREVIOUS, values)
    assert found == {
        "length_win_rate": (0.375 + 1.0) / 2,
        "length_win_rate_ci95": bootstrap_ci95([0.375, 1.0], 0),
        "length_win_rate_previous": (0.75 + 0.0) / 2,
        "length_win_rate_previous_ci95": bootstrap_ci95([0.75, 0.0], 0),
        "length_score": 2.0,
        "length_score_ci95": bootstrap_ci95([3.0, 1.5], 0),
        "start_length_score": 2.0,
        "length_on_policy_reward_accuracy": 0.5,  # all rewards are equal
        "length_on_policy_reward_accuracy_ci95": [0.5, 0.5],
    }
    assert list(map(len, judge.asked)) == [9]  # each set of samples once
    assert values.frame().sort("metric", "item").rows() == [
        ("length_score", 0, 1.5, 2.5), ("length_score", 1, 3.0, 1.0),
        ("length_win_rate", 0, 0.375, 0.5), ("length_win_rate", 1, 1.0, 0.5),
    ]  # fmt: skip


def test_in_the_first_round_the_previous_policy_is_the_start() -> None:
    judge = ByLength()
    found = metrics_of(judge, START, ItemValues())
    assert found["length_win_rate_previous"] == found["length_win_rate"]
    assert list(map(len, judge.asked)) == [6]


def test_how_often_the_reward_orders_samples_as_the_judge_does() -> None:
    ours = responses((0, "a"), (1, "aaa"), (0, "aa"), (1, "aaa"), (0, "aaa"), (1, "a"))
    rewards = pl.Series([1.0, 5.0, 3.0, 4.0, 2.0, 5.0])
    # Of prompt 0: a < aa and a < aaa rightly, aa > aaa wrongly. Of prompt 1: equal scores, a tie of rewards, one wrong.
    samples = PolicySamples(PROMPTS, ours, START, START)
    found = judge_metrics(ByLength(), samples, rewards, 0, ItemValues())
    assert found["length_on_policy_reward_accuracy"] == (1 + 1 + 0 + 0.5 + 0) / 5
    low, high = found["length_on_policy_reward_accuracy_ci95"]
    assert (low, high) == (0.25, pytest.approx(2 / 3))


def test_a_pairwise_judge_has_no_scores() -> None:
    found = metrics_of(ByBoth(), PREVIOUS, ItemValues())
    assert list(found) == [
        "pairwise_win_rate", "pairwise_win_rate_ci95", "pairwise_win_rate_previous", "pairwise_win_rate_previous_ci95",
    ]  # fmt: skip
    assert found["pairwise_win_rate"] == pytest.approx((0.5 + 0.8) / 2)
    assert found["pairwise_win_rate_previous"] == pytest.approx(((0.8 + 0.5) / 2 + 0.2) / 2)


def test_the_oracle_adds_the_round_before() -> None:
    prompts = pl.DataFrame({"prompt_id": [0], "messages": [prompt_messages("reverse", tuple("abc"))]})
    right, wrong = responses((0, "c b a .")), responses((0, "a b c ."))
    values = ItemValues()
    found = judge_metrics(OracleJudge(), PolicySamples(prompts, right, wrong, right), pl.Series([1.0]), 0, values)
    assert (found["oracle_win_rate"], found["oracle_win_rate_previous"]) == (1.0, 0.5)
    assert found["oracle_accuracy"] == 1.0
    assert OracleJudge().scores(prompts, wrong).to_list() == [pytest.approx(0.1)]
    assert set(values.frame()["metric"]) == {"oracle_win_rate", "oracle_accuracy", "oracle_score"}


def logps(chosen: list[float], rejected: list[float]) -> pl.DataFrame:
    return pl.DataFrame({"chosen_logp": chosen, "rejected_logp": rejected})


def test_metrics_of_pairs_by_hand() -> None:
    zeros = logps([0.0] * 40, [0.0] * 40)
    # The chosen is longer in the first twenty pairs, where the reward is right, and shorter in the others, where it is
    # right in one of four.
    ours = logps([1.0] * 20 + [1.0, 0.0, 0.0, 0.0] * 5, [0.0] * 20 + [0.0, 1.0, 1.0, 1.0] * 5)
    moved = logps([3.0] * 40, [0.5] * 40)
    pairs = pl.DataFrame({"chosen_ids": [[1, 2]] * 20 + [[1]] * 20, "rejected_ids": [[1]] * 20 + [[1, 2]] * 20})
    values = ItemValues()
    rows = pl.Series(range(40))
    found = pair_metrics(pairs, PairLogps(ours, zeros, moved, ours, zeros), 0, rows=rows, values=values)
    assert found["eval_pairs"] == 40
    assert found["implicit_reward_accuracy"] == 25 / 40
    assert found["implicit_reward_accuracy_initial_reference"] == 0.5  # against itself
    assert found["length_only_accuracy"] == 0.5
    assert found["worst_slice"]["slice"] == "chosen shorter"
    assert (found["worst_slice"]["pairs"], found["worst_slice"]["accuracy"]) == (20, 0.25)
    mean = sum(ours["chosen_logp"]) / 40
    assert found["chosen_logp_drift"] == pytest.approx(mean - 3.0)
    assert found["rejected_logp_drift"] == pytest.approx(sum(ours["rejected_logp"]) / 40 - 0.5)
    assert found["chosen_logp_drift_previous"] == pytest.approx(mean)
    for name in found:
        if f"{name}_ci95" in found:
            low, high = found[f"{name}_ci95"]
            assert low <= found[name] <= high
    assert values.frame().filter(pl.col("metric") == "implicit_reward_accuracy")["item"].to_list() == list(range(40))


def test_slices_by_source() -> None:
    pairs = pl.DataFrame({"chosen_ids": [[1]] * 40, "rejected_ids": [[2]] * 40, "source": ["good"] * 20 + ["bad"] * 20})
    ours, zeros = logps([1.0] * 20 + [-1.0] * 20, [0.0] * 40), logps([0.0] * 40, [0.0] * 40)
    models = PairLogps(ours, zeros, zeros, zeros, zeros)
    found = pair_metrics(pairs, models, 0, rows=pl.Series(range(40)), values=ItemValues())
    assert (found["worst_slice"]["slice"], found["worst_slice"]["accuracy"]) == ("source bad", 0.0)
