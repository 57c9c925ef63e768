"""An audit's figures: of each reward, and of length alone beside them, with what could not be measured and why."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from dice_py.errors import DataError
from dice_py.evaluation.audit.best_of_k import best_of_k, prompt_pearson, roc_auc, usual_count
from dice_py.evaluation.audit.choices import LENGTH_ONLY, Reward
from dice_py.evaluation.audit.data import AuditData
from dice_py.evaluation.audit.models import FEWEST_MODELS, Battles, Standings, battles_of, model_figures, standings
from dice_py.evaluation.audit.preferences import Agreement, agreement, brier
from dice_py.evaluation.audit.verdict import over_length, verdict_of
from dice_py.evaluation.resampling import Figure, Resamples
from dice_py.evaluation.slices import CHOSEN_LONGER, CHOSEN_SHORTER
from dice_py.storage.keys import seed_for

OF_MODELS = ("row_wise_pearson", "separability", "confidence_agreement", "kendall_tau", "spearman", "rank_brier")
OF_SETS = ("roc_auc", "end_score", "max_score", "loss", "prompt_pearson")


class Audit(NamedTuple):
    """The figures of an audit, ready for JSON, and the outcomes that they are made of."""

    figures: dict[str, Any]
    outcomes: dict[str, np.ndarray]
    """By choice, and for length alone: (comparisons,) of `AuditData.outcomes`."""


class _Measures:
    """What all rewards of an audit are measured with."""

    def __init__(self, data: AuditData, seed: int) -> None:
        self.data, self.seed = data, seed
        self.resamples = Resamples(data.prompts, seed_for(seed, "audit"))
        self.reasons: dict[str, str] = {}
        self.battles = self._battles()
        self.human: Standings | None = None
        if self.battles is not None:
            self.human = standings(self.battles, self.battles.won, self.resamples)
        self.most = self._most()
        if data.is_scored and not (data.is_verifiable and 0.0 < float(np.mean(data.score)) < 1.0):  # type: ignore[arg-type]
            self.reasons["roc_auc"] = "the scores do not say right (1) or wrong (0), both of which it needs"

    def _battles(self) -> Battles | None:
        battles = battles_of(self.data)
        reason = None
        if self.data.model is None:
            columns = "model" if self.data.is_scored else "chosen_model and rejected_model"
            reason = f"it compares models, and the file does not say which model wrote a response (column {columns})"
        elif battles is None or len(np.unique(battles.pairs)) < FEWEST_MODELS:
            reason = f"it compares models, and fewer than {FEWEST_MODELS} of them answered the same prompts"
        if reason is not None:
            self.reasons |= dict.fromkeys(OF_MODELS, reason)
            return None
        return battles

    def _most(self) -> int | None:
        if not self.data.is_scored:
            reason = "it needs several scored responses to a prompt, and these are preference pairs"
            self.reasons |= dict.fromkeys(OF_SETS, reason)
            return None
        return usual_count(self.data.prompt)

    def of(self, values: np.ndarray, outcomes: np.ndarray, *, is_log_odds: bool) -> tuple[Agreement, dict[str, Any]]:
        """A reward's agreement with the comparisons, and its entry in the figures."""
        agreed = agreement(self.data, outcomes, self.resamples, self.seed)
        figures: dict[str, Figure] = {"accuracy": agreed.accuracy, "length_balanced_accuracy": agreed.balanced}
        figures["brier"] = brier(self.data, values, self.resamples) if is_log_odds else Figure(None)
        entry: dict[str, Any] = {"slices": agreed.slices}
        if self.battles is not None and self.human is not None:
            first, second = values[self.battles.first_response], values[self.battles.second_response]
            won = (first > second) + 0.5 * (first == second)
            figures |= model_figures(self.human, standings(self.battles, won, self.resamples))
        if self.most is not None:
            best = best_of_k(self.data, values, self.most, self.resamples)
            figures |= {"end_score": best.end_score, "max_score": best.max_score, "loss": best.loss}
            figures["prompt_pearson"] = prompt_pearson(self.data, values, self.resamples)
            if "roc_auc" not in self.reasons:
                figures["roc_auc"] = roc_auc(self.data, values, self.resamples)
            entry["curve"] = best.curve
            entry["oracle_curve"] = best.oracle
        names = ("accuracy", "length_balanced_accuracy", "brier", *OF_MODELS, *OF_SETS)
        entry["metrics"] = {name: figures.get(name, Figure(None)).as_json() for name in names}
        return agreed, entry

    def why_absent(self, entries: list[dict[str, Any]]) -> dict[str, str]:
        """The reasons for the measures that are absent in all entries, or in some."""
        reasons = dict(self.reasons)
        if any(entry["metrics"]["length_balanced_accuracy"]["value"] is None for entry in entries):
            reasons["length_balanced_accuracy"] = (
                "it needs comparisons whose better response is the longer one, and others whose it is the shorter"
            )
        reasons["brier"] = (
            "lengths, and rewards per token, are no log-odds of a preference: it is of sums of log-ratios alone"
        )
        for name in ("confidence_agreement", "row_wise_pearson", "kendall_tau", "spearman", "prompt_pearson"):
            lacking = any(entry["metrics"][name]["value"] is None for entry in entries)
            if lacking and name not in reasons:
                reasons[name] = (
                    "the human preferences separate no two models"
                    if name == "confidence_agreement"
                    else "a correlation needs values that differ, of models three or more, and some reward has too few"
                )
        return reasons


def audit(data: AuditData, rewards: list[Reward], main: str, seed: int) -> Audit:
    """Measures rewards on comparisons, with length alone beside them.

    Args:
        rewards: of the responses of `data`.
        main: the name of the choice whose verdict is that of the audit.
        seed: of the bootstrap.

    Raises:
        DataError: there is nothing to compare.
    """
    if not len(data.comparisons):
        raise DataError(
            "no two responses to a prompt have different scores, so there is nothing to measure a reward by"
        )
    measures = _Measures(data, seed)
    lengths = data.tokens.astype(np.float64)
    outcomes = {LENGTH_ONLY: data.outcomes(lengths)}
    length, length_entry = measures.of(lengths, outcomes[LENGTH_ONLY], is_log_odds=False)
    entries = []
    for reward in rewards:
        name = reward.choice.name
        outcomes[name] = data.outcomes(reward.values)
        agreed, entry = measures.of(reward.values, outcomes[name], is_log_odds=reward.choice.form != "per token")
        said = verdict_of(agreed, length)
        entry["metrics"]["accuracy_over_length"] = over_length(agreed, length).as_json()
        entries.append(
            {
                "choice": name,
                "reference": reward.choice.reference,
                "form": reward.choice.form,
                "alpha": reward.alpha,
                "verdict": said.word,
                "reason": said.reason,
                **entry,
            }
        )
    of_main = next(entry for entry in entries if entry["choice"] == main)
    figures = {
        "kind": "scored set" if data.is_scored else "preference pairs",
        "prompts": data.prompts,
        "responses": len(data.prompt),
        "comparisons": len(data.comparisons),
        "chosen_longer": int(data.slices.get(CHOSEN_LONGER, np.zeros(0)).sum()),
        "chosen_shorter": int(data.slices.get(CHOSEN_SHORTER, np.zeros(0)).sum()),
        "models": list(data.models),
        "best_of": measures.most,
        "resamples": len(measures.resamples.weights),
        "main": main,
        "verdict": of_main["verdict"],
        "reason": of_main["reason"],
        "choices": entries,
        "length_alone": length_entry,
        "reasons": measures.why_absent([*entries, length_entry]),
    }
    return Audit(figures, outcomes)
