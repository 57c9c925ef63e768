"""Metrics of held-out pairs: the accuracy of the implicit reward, and how far the answers' log-probabilities moved."""

from __future__ import annotations

from typing import Any, NamedTuple

import polars as pl

from dice_py.evaluation.metrics import bootstrap_ci95, reward_outcomes
from dice_py.evaluation.slices import slice_accuracies, worst_slice
from dice_py.evaluation.values import ItemValues

_SIDES = ("chosen_logp", "rejected_logp")


class PairLogps(NamedTuple):
    """`chosen_logp` and `rejected_logp` of each pair, in nats, under each model of an evaluation."""

    policy: pl.DataFrame
    reference: pl.DataFrame
    start: pl.DataFrame
    initial_reference: pl.DataFrame
    previous: pl.DataFrame


def pair_metrics(
    pairs: pl.DataFrame, logps: PairLogps, seed: int, *, rows: pl.Series, values: ItemValues
) -> dict[str, Any]:
    """Metrics of the new policy on held-out pairs.

    Args:
        pairs: `chosen_ids` and `rejected_ids`; where there is one, `source` makes slices.
        seed: of the bootstrap.
        rows: the number of each pair, the same in every round.
        values: receives the outcomes by pair.

    Returns:
        implicit_reward_accuracy: share of the pairs whose chosen answer has the higher log π − log π_ref; ties count
            half. The same "…_initial_reference" against the first reference, and "start_…" of the start's policy.
        length_only_accuracy: of the length in tokens as the reward.
        worst_slice: of implicit_reward_accuracy (evaluation/slices.py): `slice`, `pairs`, `accuracy`, `ci95`; None
            where no slice has enough pairs.
        chosen_logp_drift, rejected_logp_drift: mean change of log π since the start, in nats an answer; and
            "…_previous", since the policy of the round before.
        eval_pairs: their number.
        Each but the last with its 95 % interval over pairs, "…_ci95".
    """
    metrics: dict[str, Any] = {"eval_pairs": pairs.height}
    outcomes: dict[str, pl.Series] = {}
    for name, policy, reference in (
        ("implicit_reward_accuracy", logps.policy, logps.reference),
        ("implicit_reward_accuracy_initial_reference", logps.policy, logps.initial_reference),
        ("start_implicit_reward_accuracy", logps.start, logps.initial_reference),
    ):
        outcomes[name] = reward_outcomes(*(policy[side] - reference[side] for side in _SIDES))
        metrics |= _mean(name, outcomes[name], seed)
    start = outcomes.pop("start_implicit_reward_accuracy")
    for name, outcome in outcomes.items():
        values.add(name, rows, outcome, start)
    lengths = [pairs[side].list.len().cast(pl.Int64) for side in ("chosen_ids", "rejected_ids")]
    metrics |= _mean("length_only_accuracy", reward_outcomes(*lengths), seed)
    source = pairs["source"].cast(pl.String) if "source" in pairs.columns else None
    worst = worst_slice(slice_accuracies(outcomes["implicit_reward_accuracy"], lengths[0], lengths[1], source, seed))
    metrics["worst_slice"] = None if worst is None else {
        "slice": worst.name, "pairs": worst.pairs, "accuracy": worst.accuracy, "ci95": worst.ci95
    }  # fmt: skip
    for since, before in (("", logps.start), ("_previous", logps.previous)):
        for side in _SIDES:
            change = logps.policy[side].cast(pl.Float64) - before[side].cast(pl.Float64)
            metrics |= _mean(f"{side}_drift{since}", change, seed)
    return metrics


def _mean(name: str, values: pl.Series, seed: int) -> dict[str, Any]:
    return {name: values.mean(), f"{name}_ci95": bootstrap_ci95(values.to_list(), seed)}
