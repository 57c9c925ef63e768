"""The optional end of a round: θ₁ + α·(θ₁ − θ₀) for several α, each evaluated, of which the best is kept.

θ₀ is the policy that the round started from, θ₁ the one that its training ended with, which is α = 0 and always a
candidate. The equation is that of ExPO (Zheng et al., arXiv 2404.16792).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dice_py.config.extrapolation import ExtrapolateConfig
from dice_py.errors import DataError
from dice_py.evaluation.judges.oracle import OracleJudge
from dice_py.events import Report, no_report, notes_once
from dice_py.models.extrapolation import NotFiniteError
from dice_py.models.identity import model_identity
from dice_py.models.loading import release_held
from dice_py.stages.evaluate import EvaluateJob
from dice_py.stages.extrapolate import ExtrapolateJob
from dice_py.stages.job import Job, StageFile, StageResult
from dice_py.storage.files import read_sealed, write_sealed
from dice_py.storage.integrity import is_kept, kept_json

METRICS = {"accuracy": "implicit_reward_accuracy", "win_rate": "oracle_win_rate"}
"""The names of extrapolate.metric in the metrics of the evaluate stage."""

_LENGTH = "mean_response_tokens"


def alpha_folder(out: Path, alpha: float) -> Path:
    """The folder of an α in that of the stage; its model is `model` there."""
    return out / f"alpha-{float(alpha)!r}"


@dataclass(frozen=True)
class ChooseAlphaJob(Job):
    """Picks 0 or an α of `config.tried`, and writes `out/choice.json`; the model of an α ≠ 0 is `out/alpha-α/model`.

    Each candidate is measured as the evaluate stage measures the new policy, and its model is deleted once another one
    is better. What was measured of an α is kept until all are done, so that a resume goes on with the next one.

    The counts: `alpha`; `metric`, its name; `measured`, for each α `alpha`, `value` of the metric,
    `mean_response_tokens` (None: not sampled), `update_kept` (as of `ExtrapolateJob`; None for 0) and `refused` (None,
    or why it cannot be picked).

    Raises, when run:
        DataError: as of `ExtrapolateJob` and `EvaluateJob`; or the trained policy has no value of the metric.
    """

    config: ExtrapolateConfig
    start: Path
    """The policy that the round started from, θ₀."""
    evaluation: EvaluateJob
    """Of the trained policy, θ₁, as it is after a round without extrapolation."""
    out: Path

    def key_fields(self) -> dict[str, Any]:
        """Settings, both models, and all that decides the metrics."""
        return {
            "extrapolate": self.config.key_fields(),
            "start of the round": model_identity(self.start),
            "evaluation": self.evaluation.key_fields(),
        }

    def run(self, report: Report = no_report) -> StageResult:
        """Measures every α that was not measured yet, and keeps the best."""
        key, file = self.key(), self.out / "choice.json"
        choice = kept_json(file, key, report)
        if choice is None:
            file.unlink(missing_ok=True)  # of other settings
            self._remove_others(set(map(self._folder, self.config.tried)) | {self._folder(0.0)})
            choice = self._choose(key, notes_once(report))
        picked = float(choice["alpha"])
        files: list[StageFile] = [(file, key)]
        if picked:
            files += self._job(picked).run(_only_progress(report)).files  # kept, or made again where it is damaged
        if not file.exists():
            write_sealed(file, choice, key)
        self._hand_over_samples(picked)
        self._remove_others({self._folder(picked)} if picked else set())
        report("note", text=self._text(choice))
        return StageResult(files, choice)

    def _folder(self, alpha: float) -> Path:
        return alpha_folder(self.out, alpha)

    def _job(self, alpha: float) -> ExtrapolateJob:
        trained = self.evaluation.policy
        return ExtrapolateJob(self.evaluation.models, self.start, trained, alpha, self._folder(alpha))

    def _choose(self, key: str, report: Report) -> dict[str, Any]:
        measured: list[dict[str, Any]] = []
        best: dict[str, Any] | None = None
        for alpha in (0.0, *self.config.tried):
            entry = self._measured(alpha, key, report)
            if best is not None:
                entry = {**entry, "refused": entry["refused"] or self._too_long(entry, measured[0])}
            elif entry["value"] is None:
                raise DataError(
                    f"the trained policy has no {METRICS[self.config.metric]}, so that no alpha can be picked by it; "
                    "set evaluate.pairs or evaluate.prompts higher, or leave out extrapolate.alphas"
                )
            measured.append(entry)
            beaten = self._better(best, entry)
            best = entry if beaten is not entry else best
            if beaten is not None and beaten["alpha"]:
                shutil.rmtree(self._folder(beaten["alpha"]) / "model", ignore_errors=True)
        assert best is not None
        return {"alpha": best["alpha"], "metric": self.config.metric, "measured": measured}

    @staticmethod
    def _better(best: dict[str, Any] | None, entry: dict[str, Any]) -> dict[str, Any] | None:
        """The worse one of the best so far and a new one. Equal values are the smaller α's: the one measured before."""
        if best is None:
            return None
        loses = entry["refused"] is not None or entry["value"] is None or entry["value"] <= best["value"]
        return entry if loses else best

    def _measured(self, alpha: float, key: str, report: Report) -> dict[str, Any]:
        """What an α gives: kept from an earlier attempt, or measured."""
        file, own_key = self._folder(alpha) / "measured.json", f"{key} {alpha!r}"
        if is_kept(file, own_key, report):
            kept = read_sealed(file, own_key)
            assert kept is not None
            return kept
        entry: dict[str, Any] = {"alpha": alpha, "value": None, _LENGTH: None, "update_kept": None, "refused": None}
        policy = self.evaluation.policy
        try:
            if alpha:
                made = self._job(alpha).run(_only_progress(report))
                policy, entry["update_kept"] = made.files[0][0], made.counts["update_kept"]
        except NotFiniteError as error:
            entry["refused"] = str(error)
        else:
            # The next candidate is sampled by an engine that needs the memory of the model that was scored last.
            release_held()
            metrics = self._candidate(policy, alpha).run(report).counts
            entry |= {"value": metrics.get(METRICS[self.config.metric]), _LENGTH: metrics.get(_LENGTH)}
        write_sealed(file, entry, own_key)
        return entry

    def _candidate(self, policy: Path, alpha: float) -> EvaluateJob:
        """The evaluation of a candidate: what α is picked by, without judges that take time or money, and the KL."""
        evaluation = self.evaluation
        return replace(
            evaluation,
            config=evaluation.config.model_copy(update={"kl_to_start": False, "kl_to_reference": False}),
            policy=policy,
            out=self._folder(alpha),
            judges=tuple(judge for judge in evaluation.judges if isinstance(judge, OracleJudge)),
            needed_judge=None,
        )

    def _too_long(self, entry: dict[str, Any], trained: dict[str, Any]) -> str | None:
        """Why an α is refused for its length; None if it is not."""
        most, before, after = self.config.max_length_growth, trained[_LENGTH], entry[_LENGTH]
        if most is None or not before or after is None or after <= (1.0 + most) * before:
            return None
        return f"responses are longer by {after / before - 1.0:.0%}, and extrapolate.max_length_growth is {most:g}"

    def _hand_over_samples(self, alpha: float) -> None:
        """Moves the best one's samples to where the evaluate stage looks for them: it draws the same."""
        made, place = self._folder(alpha) / "samples", self.evaluation.out / "samples"
        if made.is_dir():
            shutil.rmtree(place, ignore_errors=True)
            place.parent.mkdir(parents=True, exist_ok=True)
            made.rename(place)

    def _remove_others(self, kept: set[Path]) -> None:
        """Removes the folders of all α but those; of earlier settings too."""
        for folder in self.out.glob("alpha-*"):
            if folder not in kept:
                shutil.rmtree(folder)

    def _text(self, choice: dict[str, Any]) -> str:
        trained, *others = choice["measured"]
        name, picked = self.config.metric.replace("_", " "), choice["alpha"]

        def described(entry: dict[str, Any]) -> str:
            length = f", {entry[_LENGTH]:.1f} tokens" if entry[_LENGTH] is not None else ""
            value = f"{name} {entry['value']:.4f}{length}" if entry["value"] is not None else "not measured"
            why = f", refused: {entry['refused']}" if entry["refused"] else ""
            return f"alpha {entry['alpha']:g}: {value}{why}"

        kept = f"alpha {picked:g} is the new policy" if picked else "the trained policy (alpha 0) stays the new one"
        return f"extrapolation: {kept}. {'; '.join(map(described, (trained, *others)))}"


def _only_progress(report: Report) -> Report:
    """A report without notes: what a candidate's rounding loses shows in its metric."""

    def only(event: str, **fields: Any) -> None:
        if event != "note":
            report(event, **fields)

    return only
