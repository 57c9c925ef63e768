"""`dice extrapolate`: a new policy θ₁ + α·(θ₁ − θ₀) from the models before and after a training, without training.

ExPO (Zheng et al., arXiv 2404.16792); models/extrapolation.py has the sums. Not a stage of every round: the
optional end of one, which picks α, is stages/choose_alpha.py.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dice_py.config.shared import ModelConfig
from dice_py.errors import DamagedError, UsageError
from dice_py.events import Report, no_report
from dice_py.models.checkpoint import check_checkpoint
from dice_py.models.comparison import UNRELATED, have_same_weights, weights_cosine
from dice_py.models.extrapolation import plan_extrapolation, write_extrapolated
from dice_py.models.identity import files_beside_weights, model_identity
from dice_py.models.rounding import ENOUGH
from dice_py.models.same_tokenizer import check_same_tokenizer
from dice_py.models.saving import share_weights
from dice_py.stages.job import Job, StageResult
from dice_py.storage.files import atomic
from dice_py.storage.integrity import MODEL_STAMP, check_intact, read_stamp, write_stamp
from dice_py.storage.keys import versions
from dice_py.training.checkpoints import keep_model


@dataclass(frozen=True)
class ExtrapolateJob(Job):
    """Writes θ₁ + α·(θ₁ − θ₀) to `out/model`, with the config, tokenizer, chat template and dtypes of θ₁.

    A model under the job's key is left as it is. The counts: `alpha`, `tensors`, `tensors_copied` (buffers and
    integers), `update_rms` (root mean square of α·(θ₁ − θ₀)), `update_kept` (what rounding to the dtypes of θ₁ leaves
    of it, as models/rounding.py measures it; 1: all).

    Raises, when run:
        DataError: a model that `check_checkpoint` refuses, or two that do not belong together.
        UsageError: α is not finite, or both models have the same weights.
    """

    models: ModelConfig
    start: Path
    """The model before the training, θ₀."""
    after: Path
    """The model after it, θ₁."""
    alpha: float
    out: Path

    def key_fields(self) -> dict[str, Any]:
        """Both models and α."""
        return {
            "start": model_identity(self.start),
            "after": model_identity(self.after),
            "alpha": self.alpha,
            "versions": versions("torch"),
        }

    @property
    def target(self) -> Path:
        """The folder of the new model."""
        return self.out / "model"

    def run(self, report: Report = no_report) -> StageResult:
        """Extrapolates, or returns the counts of the model that is there."""
        if not math.isfinite(self.alpha):
            raise UsageError(f"alpha is {self.alpha}; give a finite number, such as 0.3")
        key = self.key()
        if keep_model(self.target, key, report):
            report("note", text=f"{self.target} is there already, from the same models and alpha, and is kept")
        else:
            self._make(key, report)
        stamp = read_stamp(self.target)
        if stamp is None:
            raise DamagedError(f"{self.target / MODEL_STAMP} is damaged: it is not as it was written")
        return StageResult([(self.target, key)], dict(stamp["counts"]))

    def _make(self, key: str, report: Report) -> None:
        check_intact([self.start, self.after])
        for role, folder in (("START", self.start), ("AFTER", self.after)):
            check_checkpoint(folder, role, self.models)
        check_same_tokenizer(self.after, self.start, self.models)
        plan = plan_extrapolation(self.start, self.after, self.models)
        if have_same_weights(self.start, self.after, rounded=False):
            raise UsageError(
                f"{self.start} and {self.after} have the same weights, so that there is no change to extrapolate; give "
                "the model before a training, and the one after it"
            )
        self._warn_of_unrelated(report)
        with atomic(self.target) as temporary:
            temporary.mkdir()
            for file in files_beside_weights(self.after):
                copy = temporary / file.relative_to(self.after)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
            change = write_extrapolated(plan, temporary, self.alpha, report)
            share_weights(temporary)
            counts = {
                "alpha": self.alpha,
                "tensors": plan.tensors,
                "tensors_copied": plan.copied,
                "update_rms": change.rms,
                "update_kept": change.kept,
            }
            # By `start`, comparisons of weights know that this model is no rounded copy of θ₀.
            write_stamp(temporary, {"key": key, "counts": counts, "start": model_identity(self.start)})
        if change.kept < ENOUGH:
            report(
                "note",
                text=f"warning: rounding to the dtype of {self.after} leaves {max(0.0, change.kept):.0%} of what alpha "
                f"{self.alpha:g} adds; give the model after the training in float32 (dice train --set "
                "train.save_dtype=float32), or raise alpha",
            )

    def _warn_of_unrelated(self, report: Report) -> None:
        cosine = weights_cosine(self.start, self.after)
        if cosine is not None and cosine < UNRELATED:
            report(
                "note",
                text=f"warning: {self.start} and {self.after} seem to share no history: the mean cosine of their "
                f"weight matrices is {cosine:.2f}, where it is near 1 for a model and its start",
            )
