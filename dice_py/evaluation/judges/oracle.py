"""The synthetic world's oracle as a judge."""

from __future__ import annotations

from typing import Any

import polars as pl

from dice_py.evaluation.metrics import bootstrap_ci95, win_rate


def oracle_metrics(
    prompts: pl.DataFrame, ours: pl.DataFrame, theirs: pl.DataFrame, rewards: pl.Series | None, seed: int
) -> dict[str, Any]:
    from dice_py.synthetic.task import oracle

    messages = dict(prompts.select("prompt_id", "messages").iter_rows())

    def by_prompt(samples: pl.DataFrame) -> dict[int, list[tuple[float, bool]]]:
        scores: dict[int, list[tuple[float, bool]]] = {}
        for prompt_id, text in samples.select("prompt_id", "response").iter_rows():
            scores.setdefault(prompt_id, []).append(oracle(messages[prompt_id], text))
        return scores

    mine, start = by_prompt(ours), by_prompt(theirs)
    rates = win_rate([([s for s, _ in mine[p]], [s for s, _ in start[p]]) for p in mine])
    right = [sum(ok for _, ok in mine[p]) / len(mine[p]) for p in mine]
    start_right = [sum(ok for _, ok in start[p]) / len(start[p]) for p in mine]
    metrics: dict[str, Any] = {
        "oracle_win_rate": sum(rates) / len(rates),
        "oracle_win_rate_ci95": bootstrap_ci95(rates, seed),
        "oracle_accuracy": sum(right) / len(right),
        "oracle_accuracy_ci95": bootstrap_ci95(right, seed),
        "start_oracle_accuracy": sum(start_right) / len(start_right),
        "oracle_accuracy_gain_ci95": bootstrap_ci95([a - b for a, b in zip(right, start_right, strict=True)], seed),
        "oracle_score": sum(s for p in mine for s, _ in mine[p]) / ours.height,
        "start_oracle_score": sum(s for p in start for s, _ in start[p]) / theirs.height,
    }
    if rewards is not None:
        scored = ours.select("prompt_id").with_columns(reward=rewards)
        values: dict[int, list[float]] = {}
        for prompt_id, reward in scored.iter_rows():
            values.setdefault(prompt_id, []).append(reward)
        won: list[float] = []
        for p, scores in mine.items():
            for i in range(len(scores)):
                for j in range(i):
                    if scores[i][0] != scores[j][0]:
                        same = (values[p][i] - values[p][j]) * (scores[i][0] - scores[j][0])
                        won.append(1.0 if same > 0 else 0.5 if same == 0 else 0.0)
        metrics["on_policy_reward_accuracy"] = sum(won) / len(won) if won else None
    return metrics
