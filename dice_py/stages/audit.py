"""The audit: how good the implicit reward is as a reward model, on data with known preferences or scores.

It belongs to no round. Each model is run over each distinct response once; all rewards come from those sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import polars as pl

from dice_py.config.shared import ModelConfig
from dice_py.config.stages import ScoreConfig
from dice_py.errors import DataError
from dice_py.events import Report, no_report
from dice_py.models.checkpoint import check_checkpoint
from dice_py.models.comparison import check_distinct, warn_of_unrelated
from dice_py.models.identity import model_identity
from dice_py.models.limits import model_positions
from dice_py.models.loading import held_model, release_held
from dice_py.models.same_tokenizer import check_same_tokenizer
from dice_py.models.tokenization import load_tokenizer, stop_token_ids
from dice_py.rows.bad_rows import BadRowRule
from dice_py.stages.job import Job, StageFile, StageResult, model_key_fields
from dice_py.storage.files import read_sealed, write_sealed
from dice_py.storage.integrity import check_intact, is_kept
from dice_py.storage.keys import versions
from dice_py.storage.parquet import write_parquet
from dice_py.timing import timed

if TYPE_CHECKING:
    import numpy as np

    from dice_py.evaluation.audit.choices import Choice
    from dice_py.evaluation.audit.inputs import AuditInputs

POLICY = "policy"


@dataclass(frozen=True)
class AuditJob(Job):
    """Audits the rewards of `policy` against each of `references`, and against none.

    The counts are the figures (evaluation/audit/report.py) with `beta`. With `out` they are also `out/audit.json`, and
    the rewards of each pair or response `out/pairs.parquet` or `out/responses.parquet`.
    """

    config: ScoreConfig
    models: ModelConfig
    policy: Path
    references: Mapping[str, Path]
    """By role: "previous", "initial", "sft"."""
    rows: pl.DataFrame
    """Of `read_audit` (evaluation/audit/reading.py); or held-out pairs, as messages."""
    rows_key: str
    """Of their content."""
    beta: float
    alpha: float | Literal["auto"]
    """Of the length penalty; "auto": for each reference what mining would find (evaluation/audit/choices.py)."""
    form: Literal["sum", "penalized", "per token"]
    """Of the reward against the first reference that the verdict is on."""
    seed: int
    out: Path | None = None
    bad_rows: BadRowRule = field(default_factory=BadRowRule)

    def key_fields(self) -> dict[str, Any]:
        """The models, the rows, the settings, the seed and versions."""
        return {
            "policy": model_identity(self.policy),
            "references": {role: model_identity(folder) for role, folder in self.references.items()},
            "rows": self.rows_key,
            "score": self.config.model_dump(),
            "model": model_key_fields(self.models),
            "beta": self.beta,
            "alpha": self.alpha,
            "form": self.form,
            "seed": self.seed,
            "versions": versions("torch", "transformers", "scipy", "numpy"),
        }

    @property
    def files(self) -> list[Path]:
        """What it writes: the rewards first, the figures last."""
        if self.out is None:
            return []
        name = "responses" if "score" in self.rows.columns else "pairs"
        return [self.out / f"{name}.parquet", self.out / "audit.json"]

    def run(self, report: Report = no_report) -> StageResult:
        """Scores and measures. With `out`, files of an equal audit are kept."""
        key = self.key()
        made: list[StageFile] = [(file, key) for file in self.files]
        are_kept = [is_kept(file, key, report) for file in self.files]  # all are looked at: some may be set aside
        if made and all(are_kept):
            kept = read_sealed(self.files[-1], key)
            if kept is not None:
                report("note", text=f"the same audit is in {self.out} already")
                return StageResult(made, kept)
        roles = self._check_models(report)
        inputs = self._inputs(report)
        logps = self._logps(roles, inputs, report)
        figures, frame = self._measured(inputs, logps, list(roles)[1:])
        if made:
            write_parquet(self.files[0], frame, key=key)
            write_sealed(self.files[-1], figures, key)
        return StageResult(made, figures)

    def _check_models(self, report: Report) -> dict[str, Path]:
        """The models by role, the policy first. A reference that is the same model as an earlier one is left out."""
        check_intact([self.policy, *self.references.values()])
        check_checkpoint(self.policy, POLICY, self.models)
        roles = {POLICY: self.policy}
        known: dict[str, str] = {}
        for role, folder in self.references.items():
            check_checkpoint(folder, f"{role} reference", self.models)
            identity = model_identity(folder)
            if identity in known:
                report("note", text=f"{role} is the same model as {known[identity]}: its rewards are those of it")
                continue
            check_distinct(self.policy, folder, allowed=self.config.allow_same_model, report=report)
            warn_of_unrelated(self.policy, folder, report)
            check_same_tokenizer(self.policy, folder, self.models, report)
            known[identity] = role
            roles[role] = folder
        return roles

    def _inputs(self, report: Report) -> AuditInputs:
        with timed("import"):
            from dice_py.evaluation.audit.inputs import encode_rows

        tokenizer = load_tokenizer(self.policy, self.models)
        folders = (self.policy, *self.references.values())
        limits = [limit for folder in folders if (limit := model_positions(folder, self.models)) is not None]
        return encode_rows(
            self.rows,
            tokenizer,
            stop_token_ids(self.policy, tokenizer),
            positions=min(limits, default=None),
            rule=self.bad_rows,
            report=report,
        )

    def _logps(self, roles: Mapping[str, Path], inputs: AuditInputs, report: Report) -> dict[str, np.ndarray]:
        """log π(y|x) in nats under each model, one entry per response of the data."""
        with timed("import"):
            import numpy as np

            from dice_py.scoring.scorer import Scorer

        found = {}
        done, total = 0, len(roles) * len(inputs.responses)

        def on_batch(scored: int) -> None:
            nonlocal done
            done += scored
            report("progress", stage="audit", done=done, total=total, unit="sequences")

        for role, folder in roles.items():
            scorer = Scorer(held_model(folder, self.models), self.config, report)
            sums = np.array(scorer.sums(inputs.prompts, inputs.responses, on_batch))
            if not np.isfinite(sums).all():
                raise DataError(
                    f"the log-probabilities of the {role} ({folder}) are not finite; its weights are damaged, or "
                    "model.dtype is too small for it: try --set model.dtype=float32"
                )
            found[role] = sums[inputs.distinct]
        release_held()
        return found

    def _measured(
        self, inputs: AuditInputs, logps: Mapping[str, np.ndarray], references: list[str]
    ) -> tuple[dict[str, Any], pl.DataFrame]:
        """The figures, and the rows with their log-probabilities, rewards and outcomes."""
        with timed("import"):
            from dice_py.evaluation.audit.choices import Choice, choices, rewards_of
            from dice_py.evaluation.audit.report import audit
            from dice_py.evaluation.audit.rewards_file import rewards_frame

        wanted: list[Choice] = choices(references)
        rewards = rewards_of(inputs.data, logps, wanted, self.beta, self.alpha)
        main = Choice(wanted[0].reference, self.form)
        audited = audit(inputs.data, rewards, main.name, self.seed)
        frame = rewards_frame(inputs, logps, rewards, audited.outcomes)
        return {"beta": self.beta, **audited.figures}, frame
