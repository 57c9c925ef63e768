"""Preference pairs of any file as pairs to read, with the credit of each token if there are two models. No round's."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.config.shared import ModelConfig
from dice_py.config.stages import ScoreConfig
from dice_py.errors import DataError
from dice_py.events import Report, no_report
from dice_py.models.checkpoint import check_checkpoint
from dice_py.models.comparison import check_distinct, warn_of_unrelated
from dice_py.models.identity import model_identity
from dice_py.models.limits import model_positions
from dice_py.models.same_tokenizer import check_same_tokenizer
from dice_py.models.tokenization import encode_pairs, load_tokenizer, stop_token_ids
from dice_py.rows.bad_rows import BadRowRule
from dice_py.stages.inspected_pairs import SIDES, file_pairs, fitted
from dice_py.stages.job import Job, StageResult, model_key_fields
from dice_py.stages.token_credit import with_credit
from dice_py.storage.integrity import check_intact
from dice_py.storage.keys import versions
from dice_py.storage.parquet import write_parquet
from dice_py.storage.schemas import INSPECTED_PAIRS


@dataclass(frozen=True)
class Scoring:
    """The reward r = β·log π/π_ref of the pairs, and how it is computed."""

    config: ScoreConfig
    models: ModelConfig
    policy: Path
    reference: Path
    beta: float
    bad_rows: BadRowRule = field(default_factory=BadRowRule)
    """What happens to a pair that the chat template refuses."""


@dataclass(frozen=True)
class InspectFileJob(Job):
    """Writes `out/pairs.parquet` (INSPECTED_PAIRS). Without `scoring` the pairs have neither rewards nor lengths.

    The counts are `pairs`, and `tokens` that both models were run over. Pairs that the models cannot read, since they
    are too long or the same once tokenized, are left out with a note.
    """

    pairs: pl.DataFrame
    """`prompt`, `chosen`, `rejected` (messages), `row` (the number in the file), and maybe `source` and `where`."""
    pairs_key: str
    """Of their content."""
    scoring: Scoring | None
    out: Path

    def key_fields(self) -> dict[str, Any]:
        """The pairs, the models, the settings and versions."""
        fields: dict[str, Any] = {"pairs": self.pairs_key, "rows": self.pairs["row"].to_list()}
        scoring = self.scoring
        if scoring is None:
            return fields
        return fields | {
            "policy": model_identity(scoring.policy),
            "reference": model_identity(scoring.reference),
            "score": scoring.config.model_dump(),
            "model": model_key_fields(scoring.models),
            "beta": scoring.beta,
            "versions": versions("torch", "transformers"),
        }

    def run(self, report: Report = no_report) -> StageResult:
        """Runs both models over both responses of each pair, if there are models."""
        counts: dict[str, Any] = {}
        pairs = file_pairs(self.pairs)
        if self.scoring is not None:
            pairs, counts = self._scored(self.scoring, report)
        file, key = self.out / "pairs.parquet", self.key()
        counts = {"pairs": pairs.height, **counts}
        write_parquet(file, fitted(pairs), key=key, schema=INSPECTED_PAIRS, meta=counts)
        return StageResult([(file, key)], counts)

    def _scored(self, scoring: Scoring, report: Report) -> tuple[pl.DataFrame, dict[str, Any]]:
        """The pairs with tokens, credits and rewards."""
        policy, reference, models = scoring.policy, scoring.reference, scoring.models
        check_intact([policy, reference])
        for role, folder in (("policy", policy), ("reference", reference)):
            check_checkpoint(folder, role, models)
        check_distinct(policy, reference, allowed=scoring.config.allow_same_model, report=report)
        warn_of_unrelated(policy, reference, report)
        check_same_tokenizer(policy, reference, models, report)
        tokenizer = load_tokenizer(policy, models)
        limits = [limit for folder in (policy, reference) if (limit := model_positions(folder, models)) is not None]
        encoded = encode_pairs(
            self.pairs,
            tokenizer,
            stop_token_ids(policy, tokenizer),
            positions=min(limits, default=None),
            rule=scoring.bad_rows,
            report=report,
        )
        if encoded.is_empty():
            raise DataError("the models can read none of the pairs that were drawn; the notes above say why")
        credited = with_credit(
            file_pairs(encoded),
            config=scoring.config,
            models=models,
            policy=policy,
            reference=reference,
            beta=scoring.beta,
            report=report,
        )
        rewards = credited.rewards
        pairs = credited.pairs.with_columns(
            *(rewards[side].cast(pl.Float32).alias(f"{side}_reward") for side in SIDES),
            margin=(rewards["chosen"] - rewards["rejected"]).cast(pl.Float32),
        )
        return pairs, {"tokens": credited.tokens}
