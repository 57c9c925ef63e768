"""The oracle of the synthetic task as a judge. It knows the right answers, so it judges only prompts of that task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import polars as pl

from dice_py.evaluation.judges.base import ScoringJudge
from dice_py.evaluation.metrics import bootstrap_ci95, win_rate
from dice_py.evaluation.reward_order import on_policy_accuracy
from dice_py.evaluation.values import ItemValues
from dice_py.events import Report, no_report
from dice_py.synthetic.task import oracle


@dataclass(frozen=True)
class OracleJudge(ScoringJudge):
    """Scores responses to prompts of the synthetic world."""

    name: ClassVar[str] = "oracle"

    def key_fields(self) -> dict[str, Any]:
        """None: the task is part of this program, whose version is in every key."""
        return {}

    def scores(self, prompts: pl.DataFrame, samples: pl.DataFrame, report: Report = no_report) -> pl.Series:
        """The oracle's score of each response (synthetic/task.py), at most 1."""
        messages = dict(prompts.select("prompt_id", "messages").iter_rows())
        rows = samples.select("prompt_id", "response").iter_rows()
        return pl.Series([oracle(messages[prompt_id], text)[0] for prompt_id, text in rows], dtype=pl.Float64)


def oracle_metrics(
    prompts: pl.DataFrame,
    ours: pl.DataFrame,
    theirs: pl.DataFrame,
    rewards: pl.Series | None,
    seed: int,
    values: ItemValues | None = None,
) -> dict[str, Any]:
    """Metrics of the oracle's scores of two models' samples.

    Args:
        prompts: `prompt_id` and `messages`, prompts of the synthetic task.
        ours, theirs: `prompt_id` and `response`, samples of the evaluated policy and of the policy that the run
            started from, on the same prompts.
        rewards: the implicit reward of each row of `ours`; None leaves out the accuracy of the reward.
        seed: of the bootstrap.
        values: receives the win rate, accuracy and score of each prompt.

    Returns:
        `oracle_win_rate`: mean over prompts of the win rate of ours over theirs, with `oracle_win_rate_ci95`.
        `oracle_accuracy`, `start_oracle_accuracy`: mean over prompts of the share of right answers, with
        `oracle_accuracy_ci95` and, for the difference of the two, `oracle_accuracy_gain_ci95`.
        `oracle_score`, `start_oracle_score`: mean score over samples, with `oracle_score_ci95` over prompts.
        `on_policy_reward_accuracy`, with `rewards`: the share of pairs of our samples for a prompt, with different
        scores, that the reward orders as the oracle does (ties of rewards count half), with its interval over prompts;
            None without such a pair.
        Rates and accuracies are from 0 to 1.
    """
    messages = dict(prompts.select("prompt_id", "messages").iter_rows())

    def judge(samples: pl.DataFrame) -> dict[int, list[tuple[float, bool]]]:
        """The oracle's (score, right) for each sample, by prompt."""
        judged: dict[int, list[tuple[float, bool]]] = {}
        for prompt_id, text in samples.select("prompt_id", "response").iter_rows():
            judged.setdefault(prompt_id, []).append(oracle(messages[prompt_id], text))
        return judged

    our_scores, their_scores = judge(ours), judge(theirs)
    rates = win_rate([([s for s, _ in our_scores[p]], [s for s, _ in their_scores[p]]) for p in our_scores])
    right = [sum(ok for _, ok in our_scores[p]) / len(our_scores[p]) for p in our_scores]
    start_right = [sum(ok for _, ok in their_scores[p]) / len(their_scores[p]) for p in our_scores]
    scores, start_scores = ([_mean_score(judged[p]) for p in our_scores] for judged in (our_scores, their_scores))
    if values is not None:
        values.add("oracle_win_rate", our_scores, rates, 0.5)  # of the start against itself
        values.add("oracle_accuracy", our_scores, right, start_right)
        values.add("oracle_score", our_scores, scores, start_scores)
    metrics: dict[str, Any] = {
        "oracle_win_rate": sum(rates) / len(rates),
        "oracle_win_rate_ci95": bootstrap_ci95(rates, seed),
        "oracle_accuracy": sum(right) / len(right),
        "oracle_accuracy_ci95": bootstrap_ci95(right, seed),
        "start_oracle_accuracy": sum(start_right) / len(start_right),
        "oracle_accuracy_gain_ci95": bootstrap_ci95([a - b for a, b in zip(right, start_right, strict=True)], seed),
        "oracle_score": sum(s for p in our_scores for s, _ in our_scores[p]) / ours.height,
        "oracle_score_ci95": bootstrap_ci95(scores, seed),
        "start_oracle_score": sum(s for p in their_scores for s, _ in their_scores[p]) / theirs.height,
    }
    if rewards is not None:
        in_order = {p: iter(judged) for p, judged in our_scores.items()}
        row_scores = [next(in_order[p])[0] for p in ours["prompt_id"]]
        metrics |= on_policy_accuracy("on_policy_reward_accuracy", ours["prompt_id"], row_scores, rewards, seed)
    return metrics


def _mean_score(judged: list[tuple[float, bool]]) -> float:
    return sum(score for score, _ in judged) / len(judged)
