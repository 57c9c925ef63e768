"""`dice judge`: a judge compares two models' responses to the same prompts, pair by pair.

Its verdicts are written as AlpacaEval's annotations, in which `output_1` is theirs and `output_2` ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.errors import DataError
from dice_py.evaluation.comparison import scores_of_each
from dice_py.evaluation.judges.base import Judge, PairwiseJudge, ScoringJudge, Verdicts
from dice_py.evaluation.metrics import bootstrap_ci95
from dice_py.evaluation.response_sets import Matched, prompt_text
from dice_py.evaluation.winrate.alpaca_eval import write_annotations
from dice_py.events import Report, no_report
from dice_py.stages.job import Job, StageResult
from dice_py.storage.keys import digest, versions
from dice_py.storage.lookup import look_up


@dataclass(frozen=True)
class JudgeJob(Job):
    """Judges pairs of responses; the counts are the win rate and what belongs to it."""

    judge: Judge
    matched: Matched
    names: tuple[str, str]
    """Of ours and of theirs."""
    out: Path | None
    """Where the annotations go; None: nowhere."""
    seed: int
    """Of the bootstrap."""

    def key_fields(self) -> dict[str, Any]:
        """The judge, the responses, the names, the seed and versions."""
        matched = self.matched
        rows = [frame.to_dict(as_series=False) for frame in (matched.prompts, matched.ours, matched.theirs)]
        return {
            "judge": {self.judge.name: self.judge.key_fields()},
            "responses": digest(rows),
            "names": self.names,
            "seed": self.seed,
            "versions": versions(),
        }

    def run(self, report: Report = no_report) -> StageResult:
        """Judges every pair.

        Returns:
            The annotations, and the counts: `prompts`, `pairs`; `win_rate` of ours, from 0 to 1 (the mean over prompts
            of the mean over their pairs; ties count half), with `win_rate_ci95` over prompts; `wins`, `losses`, `ties`
            and `no_verdict`, of pairs; mean lengths in characters; and what the judge counted.
        """
        verdicts = self._verdicts(report)
        preferences = verdicts.preferences
        by_prompt = (
            self.matched.ours.select("prompt_id")
            .with_columns(preferences.alias("win_rate"))
            .drop_nulls("win_rate")
            .group_by("prompt_id")
            .agg(pl.col("win_rate").mean())
            .sort("prompt_id")
        )
        if by_prompt.is_empty():
            raise DataError(f"the judge {self.judge.name} gives no verdict on any pair, so there is no win rate")
        rates = by_prompt["win_rate"].to_list()
        ours, theirs = (frame["response"].str.len_chars().mean() for frame in (self.matched.ours, self.matched.theirs))
        counts: dict[str, Any] = {
            "judge": self.judge.name,
            "ours": self.names[0],
            "theirs": self.names[1],
            "prompts": by_prompt.height,
            "pairs": len(preferences),
            "win_rate": sum(rates) / len(rates),
            "win_rate_ci95": bootstrap_ci95(rates, self.seed),
            "wins": int((preferences > 0.5).sum()),
            "losses": int((preferences < 0.5).sum()),
            "ties": int((preferences == 0.5).sum()),
            "no_verdict": preferences.null_count(),
            "mean_response_chars_ours": ours,
            "mean_response_chars_theirs": theirs,
            **self.matched.counts,
            **verdicts.counts,
        }
        if self.out is None:
            return StageResult([], counts)
        write_annotations(self.out, self._annotations(preferences))
        return StageResult([(self.out, self.key())], counts)

    def _verdicts(self, report: Report) -> Verdicts:
        matched = self.matched
        if isinstance(self.judge, PairwiseJudge):
            return self.judge.verdicts(matched.prompts, matched.ours, matched.theirs, report)
        if not isinstance(self.judge, ScoringJudge):
            raise TypeError(f"{type(self.judge).__name__} is neither a ScoringJudge nor a PairwiseJudge")
        ours, theirs = scores_of_each(self.judge, matched.prompts, (matched.ours, matched.theirs), report)
        wins = (ours > theirs).cast(pl.Float64) + 0.5 * (ours == theirs).cast(pl.Float64)
        return Verdicts(wins, {})

    def _annotations(self, preferences: pl.Series) -> pl.DataFrame:
        texts = self.matched.prompts.select(
            "prompt_id",
            "dataset",
            pl.Series("instruction", list(map(prompt_text, self.matched.prompts["messages"].to_list()))),
        )
        asked = self.matched.ours.select("prompt_id")
        rows = look_up(asked, texts, "prompt_id", who="the pairs of responses", where="the prompts of both")
        return rows.select(
            "instruction",
            self.matched.theirs["response"].alias("output_1"),
            pl.lit(self.names[1]).alias("generator_1"),
            self.matched.ours["response"].alias("output_2"),
            pl.lit(self.names[0]).alias("generator_2"),
            (1.0 + preferences).alias("preference"),
            pl.lit(self.judge.annotator).alias("annotator"),
            "dataset",
        )
