"""The log-probabilities of a training set's pairs: of the reference of the loss, and of the policy where it is another.

Mined pairs have those of the policy, and of the reward's reference, from their scores. Replayed pairs have none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import polars as pl

from dice_py.config.shared import ModelConfig
from dice_py.config.stages import ScoreConfig
from dice_py.events import Report
from dice_py.scoring.pairs import score_pairs

ReferenceScores = Literal["logp", "ref_logp"]
"""The column of the scores that the reference's log-probabilities stand in."""


@dataclass(frozen=True)
class PairLogps:
    """Scores pairs for the loss."""

    config: ScoreConfig
    models: ModelConfig
    policy: Path
    reference: Path
    """Of the loss; the policy itself in plain DPO."""
    reference_scores: ReferenceScores | None
    """Where mined pairs have the reference's log-probabilities; None: they are scored here."""
    shared: bool
    """Whether `SHARED_LOGPS` are added (train.ld_alpha)."""
    report: Report

    @property
    def has_own_reference(self) -> bool:
        """Whether the reference of the loss is another model than the policy."""
        return self.reference != self.policy

    def of_mined(self, pairs: pl.DataFrame) -> pl.DataFrame:
        """Mined pairs with what their scores lack. They have `ref_…`, or `start_…` of the policy and maybe `ref_…`."""
        if self.reference_scores is not None and not self.shared:
            return pairs
        if self.reference_scores is None:
            pairs = pairs.rename({f"ref_{side}_logps": f"start_{side}_logps" for side in ("chosen", "rejected")})
        scored = self._scored(self.reference, pairs, shared=self.shared)
        return pairs.hstack(scored.select(name for name in scored.columns if name not in pairs.columns))

    def of_replayed(self, pairs: pl.DataFrame) -> pl.DataFrame:
        """Pairs without log-probabilities, with all of them."""
        scored = self._scored(self.reference, pairs, shared=self.shared)
        if self.has_own_reference:
            start = self._scored(self.policy, pairs, shared=False)
            scored = scored.hstack(start.rename(lambda name: name.replace("ref_", "start_")))
        return pairs.hstack(scored)

    def _scored(self, model: Path, pairs: pl.DataFrame, *, shared: bool) -> pl.DataFrame:
        logps = score_pairs(self.config, self.models, policy=model, pairs=pairs, shared=shared, report=self.report)
        return logps.rename(lambda name: f"ref_{name}s")
