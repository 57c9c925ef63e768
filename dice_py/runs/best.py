"""Compares the rounds of a run by a metric: ends the run after one that is worse than its start, and names the best.

The metric is one of the evaluation's (`rounds.metric`). A round is compared with the policy that it started from: that
of the round before, or in round 1 that of the run's start. The difference is paired: of the same held-out prompts or
pairs, with a 95 % interval by a bootstrap over them. A round is worse if the complete interval lies below zero.

The manifest keeps the `outcome`: the new policy, and what was compared. All of it follows from the evaluations and the
settings, so a resume finds the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.config.rounds import COMMAND_PREFIX
from dice_py.config.run import RunConfig
from dice_py.errors import UsageError
from dice_py.evaluation.values import change
from dice_py.runs.folder import Run, round_name
from dice_py.runs.inputs import Inputs
from dice_py.storage.keys import seed_for
from dice_py.storage.parquet import read_parquet

_OUTCOME = "outcome"


class Outcome:
    """The rounds of a run so far, and which of their policies is the run's new policy.

    Raises:
        UsageError: the run has no held-out data for the metric.
    """

    def __init__(self, run: Run, inputs: Inputs) -> None:
        self._run = run
        self._rounds = run.config.rounds
        self._metric = run.config.round_metric
        self._policies: dict[str, Path] = {}
        self._comparisons: dict[str, dict[str, Any]] = {}
        _check_held_out(run.config, inputs)
        run.manifest.data.pop(_OUTCOME, None)

    def add(self, number: int, policy: Path, metrics: dict[str, Any]) -> bool:
        """Compares round `number` with its start, and keeps it in the manifest.

        Args:
            policy: the round's new policy.
            metrics: of its evaluation.

        Returns:
            Whether the run ends here, before the rounds that were asked for.
        """
        name = round_name(number)
        self._policies[name] = policy
        is_worse = False
        if self._metric is not None and self._metric.startswith(COMMAND_PREFIX):
            self._note_number(number, self._metric, metrics)
        elif self._metric is not None:
            is_worse = self._compare(number, self._metric, metrics)
        ends = is_worse and self._rounds.stop_when == "worse" and number < self._rounds.count
        self._save(number if ends else None)
        if ends:
            text = (
                f"the run ends after round {number} of {self._rounds.count} (rounds.stop_when=worse). To go on: "
                f"dice resume {self._run.folder} --set rounds.stop_when=none"
            )
            self._run.report("ended_early", round=number, rounds=self._rounds.count, text=text)
            self._run.report("note", text=text)
        return ends

    def finish(self) -> dict[str, Any]:
        """The fields of the event at the end of the run: `policy`, its folder, and `round`, which made it.

        Notes say where it is not the last round's, and where no round is better than the start of the run.
        """
        best, last = self._best(), list(self._policies)[-1]
        if self._rounds.keep == "best" and best in self._comparisons:
            value, first = self._comparisons[best]["value"], self._comparisons.get(round_name(1), {}).get("start")
            if best != last:
                text = f"the new policy is that of {best}, the best by {self._metric} ({value:.4g})"
                of_last = self._comparisons.get(last)
                text += f"; {last} has {of_last['value']:.4g}" if of_last else f"; {last} was not measured"
                self._run.report("note", text=text)
            if first is not None and first >= value:
                text = f"no round is better by {self._metric} than the policy that the run started from"
                self._run.report("note", text=f"{text} ({first:.4g}; the best round: {value:.4g}): keep that one")
        return {"policy": str(self._policies[best]), "round": best}

    def _best(self) -> str:
        """The round whose policy is kept; of equal ones the earlier."""
        best = best_round(self._comparisons) if self._rounds.keep == "best" else None
        return list(self._policies)[-1] if best is None else best

    def _note_number(self, number: int, metric: str, metrics: dict[str, Any]) -> None:
        """Keeps a round's number of the user's benchmark, which has no value of the start and no interval."""
        value = metrics.get(metric)
        if value is None:
            text = f"round {number} has no {metric}: the benchmark failed, or did not print it"
            self._run.report("note", text=f"warning: {text}. The round is not kept as the best one")
            return
        comparison = {"metric": metric, "value": float(value), "worse": False}
        self._comparisons[round_name(number)] = comparison
        self._run.report("comparison", round=number, **comparison)
        self._run.report("note", text=comparison_text(comparison))

    def _compare(self, number: int, metric: str, metrics: dict[str, Any]) -> bool:
        """Compares a round with its start, and reports it; True if it is worse."""
        after = self._values(number, metric)
        before = after.select("item", value="start") if number == 1 else self._values(number - 1, metric)
        difference = change(before, after, seed_for(self._run.config.seed, "rounds", number))
        comparison = {
            "metric": metric,
            "value": float(metrics[metric]),
            "ci95": metrics[f"{metric}_ci95"],
            "start": float(before["value"].mean()),  # type: ignore[arg-type]
            "change": difference.mean,
            "change_ci95": difference.ci95,
            "items": difference.items,
            "worse": difference.is_worse,
        }
        self._comparisons[round_name(number)] = comparison
        self._run.report("comparison", round=number, **comparison)
        self._run.report("note", text=comparison_text(comparison))
        return difference.is_worse

    def _values(self, number: int, metric: str) -> pl.DataFrame:
        values = read_parquet(self._run.round_folder(number) / "evaluate" / "values.parquet")
        return values.filter(pl.col("metric") == metric)

    def _save(self, ended_after: int | None) -> None:
        best = self._best()
        self._run.manifest.data[_OUTCOME] = {
            "settings": self._rounds.model_dump(mode="json"),
            "round": best,
            "policy": str(self._policies[best].relative_to(self._run.folder)),
            "comparisons": self._comparisons,
            "ended_after": ended_after,
            "through": len(self._policies),
        }
        self._run.manifest.save()


def best_round(comparisons: dict[str, dict[str, Any]]) -> str | None:
    """The best of the rounds that were compared, of equal ones the earlier; None where none was."""
    return max(comparisons, key=lambda name: float(comparisons[name]["value"]), default=None)


def comparison_text(comparison: dict[str, Any]) -> str:
    """A comparison of a round with its start as a sentence: the metric, its interval, and the change with its own."""
    if "change" not in comparison:
        return f"{comparison['metric']} {comparison['value']:.4g}"
    (low, high), (least, most) = comparison["ci95"], comparison["change_ci95"]
    verdict = "worse than" if comparison["worse"] else "better than" if least > 0 else "not distinguishable from"
    return (
        f"{comparison['metric']} {comparison['value']:.4g} ({low:.4g} to {high:.4g}): {verdict} the policy that the "
        f"round started from ({comparison['start']:.4g}); the change is {comparison['change']:+.4g} ({least:+.4g} to "
        f"{most:+.4g}, 95 % interval over {comparison['items']} items)"
    )


def _check_held_out(config: RunConfig, inputs: Inputs) -> None:
    metric = config.round_metric
    if metric is None or metric.startswith(COMMAND_PREFIX):
        return
    of_pairs = metric.startswith("implicit_reward")
    if (inputs.eval_pairs if of_pairs else inputs.eval_prompts) is None:
        kind, key = ("pairs", "data.eval_pairs") if of_pairs else ("prompts", "data.eval_prompts")
        raise UsageError(
            f"rounds.metric is {metric}, but there are too few {kind} to hold any out for it: give them in {key}"
        )


@dataclass(frozen=True)
class StoredOutcome:
    """What a manifest says of the rounds that a run has made."""

    policy: Path
    """The new policy so far, relative to the run folder."""
    comparisons: dict[str, dict[str, Any]]
    """By round, where rounds are compared."""
    ended_after: int | None
    """The round that ended the run before the rounds that were asked for."""
    through: int | None = None
    """How many rounds the run has gone through; None: an earlier version did not say."""


def stored_outcome(data: dict[str, Any]) -> StoredOutcome | None:
    """The outcome in a manifest; None where there is none, or where it is of other settings than the manifest's."""
    outcome, config = data.get(_OUTCOME), data.get("config")
    if not isinstance(outcome, dict) or not isinstance(config, dict):
        return None
    policy, comparisons = outcome.get("policy"), outcome.get("comparisons")
    ended, through = outcome.get("ended_after"), outcome.get("through")
    if not isinstance(policy, str) or not isinstance(comparisons, dict) or not isinstance(ended, int | None):
        return None
    if outcome.get("settings") != config.get("rounds"):
        return None
    return StoredOutcome(Path(policy), comparisons, ended, through if isinstance(through, int) else None)


def new_policy(folder: Path, data: dict[str, Any], config: RunConfig) -> Path:
    """The folder of a finished run's new policy. An earlier version kept no outcome: it is the last round's.

    Args:
        folder: of the run.
        data: of its manifest.
    """
    outcome = stored_outcome(data)
    return folder / (outcome.policy if outcome else Path(round_name(config.rounds.count)) / "train" / "model")
