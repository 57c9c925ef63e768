"""How often the implicit reward orders a policy's own samples as a judge's scores do."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from typing import Any


def on_policy_accuracy(
    name: str, prompt_ids: Iterable[int], scores: Iterable[float], rewards: Iterable[float], seed: int
) -> dict[str, Any]:
    """The share of sample pairs with different scores that the rewards order alike.

    Args:
        name: of the metric.
        prompt_ids, scores, rewards: of each sample; only samples of one prompt are compared.
        seed: of the bootstrap.

    Returns:
        The share, 0 to 1, over the pairs of all prompts, in which a tie of rewards counts half, and its 95 % interval
        over prompts, "…_ci95". None without a pair of different scores.
    """
    import numpy as np

    from dice_py.evaluation.resampling import column_ratio, statistic_ci95

    by_prompt: dict[int, list[tuple[float, float]]] = {}
    for prompt_id, score, reward in zip(prompt_ids, scores, rewards, strict=True):
        by_prompt.setdefault(prompt_id, []).append((score, reward))
    sums: list[tuple[float, float]] = []
    for samples in by_prompt.values():
        agrees = []
        for (score, reward), (other_score, other_reward) in combinations(samples, 2):
            if score != other_score:
                agreement = (reward - other_reward) * (score - other_score)
                agrees.append(1.0 if agreement > 0 else 0.5 if agreement == 0 else 0.0)
        if agrees:
            sums.append((sum(agrees), float(len(agrees))))
    if not sums:
        return {name: None, f"{name}_ci95": None}
    table = np.array(sums)
    agreed, pairs = table.sum(axis=0)
    return {name: float(agreed / pairs), f"{name}_ci95": statistic_ci95(table, column_ratio, seed)}
