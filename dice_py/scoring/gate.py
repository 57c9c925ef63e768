"""The gate: decides whether the log-probabilities that came with the samples replace the scorer's.

They do if, on a sample of responses, the implicit reward differs on average by no more than a share of its standard
deviation (`score.gate_tolerance`). Then the policy's forward over the shards is skipped.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dice_py.compute.shard_queue import ShardQueue
from dice_py.config.shared import ModelConfig
from dice_py.config.stages import ScoreConfig
from dice_py.events import Report
from dice_py.models.loading import held_model
from dice_py.scoring.shards import Columns, Shard, shard_logps
from dice_py.storage.files import read_sealed, write_sealed
from dice_py.storage.keys import seed_for
from dice_py.storage.parquet import read_parquet
from dice_py.timing import timed

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class MeasureGate:
    """Measures the gate and writes its figures to `out`; a single "shard" of work.

    The figures: `responses`; `mean_abs_difference` and `max_abs_difference` of the implicit reward; `reward_std`, its
    standard deviation on the same responses; `share`, `mean_abs_difference` / `reward_std`; `tolerance`; `passed`. If a
    log-probability is not finite, or all rewards are equal, the four figures of the reward are None and the gate fails.
    """

    config: ScoreConfig
    models: ModelConfig
    folder: Path
    """The policy's folder."""
    shards: list[Shard]
    """Sampled by the policy, and scored by the reference."""
    columns: Columns
    beta: float
    out: Path
    key: str

    def __call__(self, shards: ShardQueue, *, report: Report) -> None:
        """Measures until `shards` has no more."""
        with timed("import"):
            import numpy as np

            from dice_py.scoring.scorer import Scorer

        while (number := shards.receive(wait=True)) is not None:
            scorer = Scorer(held_model(self.folder, self.models), self.config, report)
            sampled, scored, rewards = [np.zeros(0)], [np.zeros(0)], [np.zeros(0)]
            for shard, rows in gate_rows(self.config.gate_responses, self.shards, self.columns, self.key):
                logps = np.array(shard_logps(shard, scorer, self.columns, lambda _: None, rows))
                ref_logps = read_parquet(shard.ref_logps_file, ["ref_logp"])["ref_logp"].to_numpy()[rows]
                sampled.append(read_parquet(shard.generations, ["sampled_logp"])["sampled_logp"].to_numpy()[rows])
                scored.append(logps)
                rewards.append(self.beta * (logps - ref_logps))
            differences = np.concatenate(sampled).astype(np.float64) - np.concatenate(scored)
            figures = self._figures(self.beta * np.abs(differences), np.concatenate(rewards))
            write_sealed(self.out, {"gate": figures}, self.key)
            report("shard_complete", number=number)

    def _figures(self, differences: np.ndarray, rewards: np.ndarray) -> dict[str, Any]:
        import numpy as np

        spread = float(rewards.std()) if len(rewards) else 0.0
        known = bool(np.isfinite(differences).all() and np.isfinite(spread) and spread > 0)
        return {
            "responses": len(differences),
            "mean_abs_difference": float(differences.mean()) if known else None,
            "max_abs_difference": float(differences.max()) if known else None,
            "reward_std": spread if known else None,
            "share": float(differences.mean()) / spread if known else None,
            "tolerance": self.config.gate_tolerance,
            "passed": known and float(differences.mean()) <= self.config.gate_tolerance * spread,
        }


def stored_gate(file: Path, key: str) -> dict[str, Any] | None:
    """The figures that `MeasureGate` wrote under `key`; None where there are none, or the file is damaged."""
    stored = read_sealed(file, key)
    return None if stored is None else dict(stored["gate"])


def gate_rows(count: int, shards: list[Shard], columns: Columns, key: str) -> list[tuple[Shard, list[int]]]:
    """At most `count` responses, drawn from all that have tokens and seeded by `key`: row numbers by shard."""
    candidates = []
    for number, shard in enumerate(shards):
        lengths = read_parquet(shard.generations, [columns.response])[columns.response].list.len()
        candidates += [(number, row) for row in (lengths > 0).arg_true()]
    drawn = random.Random(seed_for("gate", key)).sample(candidates, min(count, len(candidates)))
    rows: dict[int, list[int]] = {}
    for number, row in sorted(drawn):
        rows.setdefault(number, []).append(row)
    return [(shards[number], numbers) for number, numbers in rows.items()]


def gate_note(gate: dict[str, Any]) -> str:
    """The outcome in one sentence, from the figures of `MeasureGate`."""
    if gate["share"] is None:
        return "the policy's log-probabilities are recomputed: those of the samples, or the rewards, are not finite"
    figures = (
        f"{gate['mean_abs_difference']:.2g} on average over {gate['responses']} responses, "
        f"{100 * gate['share']:.2g} % of the reward's standard deviation (allowed: {100 * gate['tolerance']:g} %)"
    )
    if gate["passed"]:
        return f"the policy's log-probabilities are those that came with the samples: the reward differs by {figures}"
    return f"the policy's log-probabilities are recomputed: with those of the samples the reward differs by {figures}"
