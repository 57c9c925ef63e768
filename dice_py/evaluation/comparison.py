"""How two models' samples compare under a judge, prompt by prompt."""

from __future__ import annotations

import polars as pl

from dice_py.errors import DataError
from dice_py.evaluation.judges.base import Judge, PairwiseJudge, ScoringJudge
from dice_py.evaluation.metrics import win_rate
from dice_py.events import Report, no_report


def win_rates_of_scores(
    ours: pl.DataFrame, our_scores: pl.Series, theirs: pl.DataFrame, their_scores: pl.Series
) -> pl.DataFrame:
    """The win rate of ours at each prompt that both have, over all combinations of samples; ties count half.

    Args:
        ours, theirs: `prompt_id` of each sample.
        our_scores, their_scores: their scores, row by row.

    Returns:
        `prompt_id` and `win_rate` (Float64, 0 to 1), by prompt_id.
    """
    sides = [
        pl.DataFrame({"prompt_id": samples["prompt_id"], name: scores})
        .group_by("prompt_id")
        .agg(pl.col(name).sort_by(name))
        for name, samples, scores in (("ours", ours, our_scores), ("theirs", theirs, their_scores))
    ]
    both = sides[0].join(sides[1], on="prompt_id").sort("prompt_id")
    rates = win_rate(list(both.select("ours", "theirs").iter_rows()))
    return both.select("prompt_id").with_columns(pl.Series("win_rate", rates, dtype=pl.Float64))


def win_rates(
    judge: Judge, prompts: pl.DataFrame, ours: pl.DataFrame, theirs: pl.DataFrame, report: Report = no_report
) -> pl.DataFrame:
    """The win rate of ours over theirs at each prompt that both have samples of.

    A scoring judge compares every sample of ours with every one of theirs; a pairwise judge compares the n-th with the
    n-th, as far as both have one.

    Args:
        prompts: `prompt_id` and `messages`.
        ours, theirs: `prompt_id` and `response`, one or more rows for a prompt.

    Returns:
        `prompt_id` and `win_rate` (Float64, 0 to 1), by prompt_id.

    Raises:
        DataError: no prompt has samples of both; or as of the judge.
        JudgeError: as of the judge.
    """
    if isinstance(judge, ScoringJudge):
        # In one call, so that a judge loads its models once.
        both = pl.concat([side.select("prompt_id", "response") for side in (ours, theirs)], how="vertical_relaxed")
        scores = judge.scores(prompts, both, report)
        rates = win_rates_of_scores(ours, scores[: ours.height], theirs, scores[ours.height :])
    elif isinstance(judge, PairwiseJudge):
        rates = _pairwise(judge, prompts, ours, theirs, report)
    else:
        raise TypeError(f"{type(judge).__name__} is neither a ScoringJudge nor a PairwiseJudge")
    if rates.is_empty():
        if ours.join(theirs, on="prompt_id", how="semi").is_empty():
            raise DataError("the two sets of samples have no prompt in common, so they cannot be compared")
        raise DataError(f"the judge {judge.name} gives no verdict on any prompt, so there is no win rate")
    return rates


def _pairwise(
    judge: PairwiseJudge, prompts: pl.DataFrame, ours: pl.DataFrame, theirs: pl.DataFrame, report: Report
) -> pl.DataFrame:
    place = pl.int_range(pl.len()).over("prompt_id").alias("place")
    sides = [samples.select("prompt_id", "response").with_columns(place) for samples in (ours, theirs)]
    both = sides[0].join(sides[1], on=["prompt_id", "place"], suffix="_theirs", maintain_order="left")
    if both.is_empty():
        return pl.DataFrame(schema={"prompt_id": both.schema["prompt_id"], "win_rate": pl.Float64})
    preferences = judge.preferences(
        prompts,
        both.select("prompt_id", "response"),
        both.select("prompt_id", response="response_theirs"),
        report,
    )
    # Rows without a verdict do not count, neither for one side nor as a tie.
    judged = both.select("prompt_id").with_columns(preferences.alias("win_rate")).drop_nulls("win_rate")
    return judged.group_by("prompt_id").agg(pl.col("win_rate").mean()).sort("prompt_id")
