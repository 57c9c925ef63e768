"""The metrics that a judge gives a round: win rates against the start of the run and the policy of the round before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import polars as pl

from dice_py.evaluation.comparison import scores_of_each, win_rates, win_rates_of_scores
from dice_py.evaluation.judges.base import Judge, ScoringJudge
from dice_py.evaluation.judges.oracle import OracleJudge, oracle_metrics
from dice_py.evaluation.metrics import bootstrap_ci95
from dice_py.evaluation.reward_order import on_policy_accuracy
from dice_py.evaluation.values import ItemValues
from dice_py.events import Report, no_report

PREVIOUS = "_previous"
"""Ends the names of metrics against the policy that the round started from."""


@dataclass(frozen=True)
class PolicySamples:
    """Samples of three policies on the same prompts: frames with `prompt_id` and `response`, and further columns."""

    prompts: pl.DataFrame
    """`prompt_id` and `messages`."""
    ours: pl.DataFrame
    """Of the new policy."""
    start: pl.DataFrame
    """Of the policy that the run started from."""
    previous: pl.DataFrame
    """Of the policy that the round started from; the same object as `start` in the first round."""


def judge_metrics(
    judge: Judge,
    samples: PolicySamples,
    rewards: pl.Series,
    seed: int,
    values: ItemValues,
    report: Report = no_report,
) -> dict[str, Any]:
    """The metrics of one judge, whose name begins theirs.

    Args:
        rewards: the implicit reward of each of our samples.
        seed: of the bootstrap.
        values: receives the win rate of each prompt, and its mean score.

    Returns:
        "NAME_win_rate": mean over prompts of the win rate over the start's samples, 0 to 1, and
        "NAME_win_rate_previous", over those of the policy of the round before. A judge that scores responses adds
        "NAME_score" and "start_NAME_score", means over samples, and "NAME_on_policy_reward_accuracy"
        (`on_policy_accuracy`); the oracle what `oracle_metrics` lists. Each with its 95 % interval over prompts,
        "…_ci95", but for the start's score.

    Raises:
        DataError, JudgeError: as of the judge.
    """
    name = judge.name
    scores: dict[str, pl.Series] = {}
    if isinstance(judge, ScoringJudge):
        sides = {"ours": samples.ours, "start": samples.start}
        if samples.previous is not samples.start:
            sides["previous"] = samples.previous
        scores = dict(zip(sides, scores_of_each(judge, samples.prompts, list(sides.values()), report), strict=True))
        rates = win_rates_of_scores(samples.ours, scores["ours"], samples.start, scores["start"])
    else:
        rates = win_rates(judge, samples.prompts, samples.ours, samples.start, report)
    metrics: dict[str, Any] = {}
    if isinstance(judge, OracleJudge):
        metrics |= oracle_metrics(samples.prompts, samples.ours, samples.start, rewards, seed, values)
    else:
        metrics |= _rates(f"{name}_win_rate", rates, seed)
        values.add(f"{name}_win_rate", rates["prompt_id"], rates["win_rate"], 0.5)
        if scores:
            metrics |= _scores(name, samples, scores, seed, values)
            accuracy = f"{name}_on_policy_reward_accuracy"
            metrics |= on_policy_accuracy(accuracy, samples.ours["prompt_id"], scores["ours"], rewards, seed)
    if samples.previous is not samples.start:
        if isinstance(judge, ScoringJudge):
            rates = win_rates_of_scores(samples.ours, scores["ours"], samples.previous, scores["previous"])
        else:
            rates = win_rates(judge, samples.prompts, samples.ours, samples.previous, report)
    return metrics | _rates(f"{name}_win_rate{PREVIOUS}", rates, seed)


def _rates(name: str, rates: pl.DataFrame, seed: int) -> dict[str, Any]:
    values = rates["win_rate"].to_list()
    return {name: sum(values) / len(values), f"{name}_ci95": bootstrap_ci95(values, seed)}


def _scores(
    name: str, samples: PolicySamples, scores: dict[str, pl.Series], seed: int, values: ItemValues
) -> dict[str, Any]:
    ours, start = (_by_prompt(getattr(samples, side), scores[side]) for side in ("ours", "start"))
    # A prompt that only one side has samples of cannot be compared.
    both = ours.join(start, on="prompt_id", suffix="_start", maintain_order="left")
    values.add(f"{name}_score", both["prompt_id"], both["score"], both["score_start"])
    return {
        f"{name}_score": scores["ours"].mean(),
        f"{name}_score_ci95": bootstrap_ci95(ours["score"].to_list(), seed),
        f"start_{name}_score": scores["start"].mean(),
    }


def _by_prompt(samples: pl.DataFrame, scores: pl.Series) -> pl.DataFrame:
    """`prompt_id` and the mean `score` of its samples."""
    rows = pl.DataFrame({"prompt_id": samples["prompt_id"], "score": scores})
    return rows.group_by("prompt_id", maintain_order=True).agg(pl.col("score").mean())
