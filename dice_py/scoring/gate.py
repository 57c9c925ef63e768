"""Compares the log-probabilities that came with the samples with the scorer's."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dice_py.compute.dispatch import ShardQueue
from dice_py.config.shared import ModelConfig
from dice_py.config.stages import ScoreConfig
from dice_py.events import Report
from dice_py.models.loading import held_model
from dice_py.storage.files import read_json, write_json
from dice_py.storage.keys import seed_for
from dice_py.storage.parquet import read_parquet
from dice_py.timing import timed

if TYPE_CHECKING:
    pass
from dice_py.scoring.shards import Columns, Shard, shard_sums


def measure_gate(
    items: ShardQueue,
    *,
    report: Report,
    config: ScoreConfig,
    models: ModelConfig,
    folder: Path,
    shards: list[Shard],
    columns: Columns,
    beta: float,
    out: Path,
    key: str,
) -> None:
    """Compares the log-probabilities that came with the samples with the scorer's, on a sample of responses.

    Writes to `out`: `responses`; `mean_abs_difference` and `max_abs_difference` of the implicit reward; `reward_std`,
    its spread on the same responses; `share`, the first over the spread; `passed`, whether that is within
    `score.gate_tolerance`.
    """
    with timed("import"):
        from dice_py.scoring.scorer import Scorer

    while (number := items.receive(wait=True)) is not None:
        scorer = Scorer(held_model(folder, models), config, report)
        sampled, scored, rewards = [np.zeros(0)], [np.zeros(0)], [np.zeros(0)]
        for shard, rows in gate_rows(config.gate_responses, shards, columns, key):
            ours = np.array(shard_sums(shard, scorer, columns, lambda _: None, rows))
            scored.append(ours)
            sampled.append(read_parquet(shard.generations, ["sampled_logp"])["sampled_logp"].to_numpy()[rows])
            rewards.append(beta * (ours - read_parquet(shard.half, ["ref_logp"])["ref_logp"].to_numpy()[rows]))
        apart = beta * np.abs(np.concatenate(sampled).astype(np.float64) - np.concatenate(scored))
        spread = float(np.concatenate(rewards).std()) if len(apart) else 0.0
        known = bool(np.isfinite(apart).all() and np.isfinite(spread) and spread > 0)
        figures = {
            "responses": len(apart),
            "mean_abs_difference": float(apart.mean()) if known else None,
            "max_abs_difference": float(apart.max()) if known else None,
            "reward_std": spread if known else None,
            "share": float(apart.mean()) / spread if known else None,
            "tolerance": config.gate_tolerance,
            "passed": known and float(apart.mean()) <= config.gate_tolerance * spread,
        }
        write_json(out, {"key": key, "gate": figures})
        report("item", number=number)


def stored_gate(file: Path, key: str) -> dict[str, Any] | None:
    stored = read_json(file) if file.is_file() else {}
    return stored["gate"] if stored.get("key") == key else None


def gate_rows(count: int, shards: list[Shard], columns: Columns, key: str) -> list[tuple[Shard, list[int]]]:
    """`count` responses drawn from all that have tokens, seeded by the key; by shard."""
    places = []
    for number, shard in enumerate(shards):
        lengths = read_parquet(shard.generations, [columns.response])[columns.response].list.len()
        places += [(number, row) for row in (lengths > 0).arg_true()]
    drawn = random.Random(seed_for("gate", key)).sample(places, min(count, len(places)))
    found: dict[int, list[int]] = {}
    for number, row in sorted(drawn):
        found.setdefault(number, []).append(row)
    return [(shards[number], rows) for number, rows in found.items()]


def gate_note(gate: dict[str, Any]) -> str:
    if gate["share"] is None:
        return "the policy's log-probabilities are scored: those of the samples, or the rewards, are not finite numbers"
    figures = (
        f"{gate['mean_abs_difference']:.2g} on average over {gate['responses']} responses, "
        f"{100 * gate['share']:.2g} % of the reward's standard deviation (allowed: {100 * gate['tolerance']:g} %)"
    )
    if gate["passed"]:
        return f"the policy's log-probabilities are those that came with the samples: the reward differs by {figures}"
    return f"the policy's log-probabilities are scored: with those of the samples the reward differs by {figures}"
