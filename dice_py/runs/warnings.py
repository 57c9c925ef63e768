"""Warnings about a stage's result, each with a remedy: what is lost, or is near to being noise, without an error.

A measure is a number of a stage, and its limit is the setting of the same name in the section `warnings`:

    cut_off_share       generate   responses cut off by the token limit / all responses
    duplicate_share     generate   responses with the token ids of an earlier response of their prompt / all responses
    rounding_share      score      what rounding leaves uncertain in the reward / the reward's standard deviation
    no_pair_share       mine       prompts that gave no pair, before thresholds of the margin / all prompts
    length_correlation  mine       |correlation of score and length| of the usable responses, after debiasing
    replay_shortfall    replay     replay pairs that could not be had / replay pairs that were requested
    credit_difference   inspect    largest |reward by token, summed − stored reward| / the rewards' standard deviation
    chosen_logps_fall   train      fall of the chosen responses' log-probability / its size at the start

The reward is β·(log π − log π_ref), the difference of two sums that are rounded. Its uncertainty is the larger of two
values: the mean difference between two ways of computing the policy's sum, which the gate measures (scoring/gate.py);
and β·u·√(mean(log π² + log π_ref²)), what the relative error u (unit roundoff of the dtype that the models compute in)
makes of two sums of this size.

What a judge, the user's benchmark or the stage inspect failed at is warned of without a limit.

All come from the counts of a stage but two, which are read from its shards: the sums' size, and duplicates (one shard
at a time).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import polars as pl

from dice_py.config.rounds import WarningsConfig

if TYPE_CHECKING:
    from dice_py.stages.job import StageResult

_UNIT_ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
"""Largest relative error of rounding to the nearest number, by dtype."""


@dataclass(frozen=True)
class StageWarning:
    """A measure above its limit; the text is a sentence with the remedy."""

    name: str
    value: float
    limit: float
    text: str


class _Measure(NamedTuple):
    name: str
    value: float
    text: str


def stage_warnings(stage: str, job: Any, result: StageResult, limits: WarningsConfig) -> list[StageWarning]:
    """The warnings about a stage's result.

    Counts that an earlier version did not write are not measured.

    Args:
        stage: its name in the table of stages.
        job: the stage's job.
    """
    measures = _MEASURES.get(stage)
    failures = list(_failures(stage, result))
    return failures if measures is None else failures + _above(measures(job, result, limits), limits)


def _failures(stage: str, result: StageResult) -> Iterator[StageWarning]:
    """What an evaluation or an inspection could not do: the round lacks it, and a resume tries again."""
    if stage == "inspect":
        for name, lacks in (("failure", "no pairs to read"), ("credit_failure", "no credit by token")):
            if why := result.counts.get(name):
                text = f"the round has {lacks}: {why}. The run goes on, and dice resume tries again"
                yield StageWarning(f"inspect_{name}", 1.0, 0.0, text)
    if stage == "evaluate":
        for judge, why in (result.counts.get("judge_failures") or {}).items():
            text = f"the judge {judge} failed, so the round lacks its win rates: {why}. dice resume asks it again"
            yield StageWarning("judge_failure", 1.0, 0.0, text)
    if stage == "benchmark":
        failure, left_out = result.counts.get("failure"), result.counts.get("left_out")
        if failure:
            text = f"evaluate.command gave no numbers: {failure}. dice resume runs it again"
            yield StageWarning("benchmark_failure", 1.0, 0.0, text)
        elif left_out:
            text = f"evaluate.command printed values that are no finite numbers, left out: {', '.join(left_out)}"
            yield StageWarning("benchmark_left_out", float(len(left_out)), 0.0, text)


def mining_warnings(summary: dict[str, Any], debias: str, limits: WarningsConfig) -> list[StageWarning]:
    """The warnings about a summary of mining (`MinedPairs.summary`)."""
    return _above(_of_mining(summary, debias), limits)


def _above(measures: Iterator[_Measure], limits: WarningsConfig) -> list[StageWarning]:
    return [
        StageWarning(name, value, limit, text)
        for name, value, text in measures
        if (limit := getattr(limits, name)) is not None and value > limit
    ]


def _of_generate(job: Any, result: StageResult, limits: WarningsConfig) -> Iterator[_Measure]:
    counts = result.counts
    responses = counts.get("responses") or 0
    if responses and "cut_off" in counts:
        cut_off = counts["cut_off"]
        yield _Measure(
            "cut_off_share",
            cut_off / responses,
            f"{_share(cut_off, responses, 'responses')} were cut off at generate.max_new_tokens="
            f"{job.config.max_new_tokens}, and mining drops them: raise generate.max_new_tokens. If they run on after "
            "their end, the token that ends a turn in the chat template is no stop token of the model (eos_token_id in "
            "its generation_config.json)",
        )
    if responses and limits.duplicate_share is not None:
        shards = [file for file, _ in result.files if file.suffix == ".parquet"]
        # Equal responses have equal lengths, which are read in no time: most runs have too few of these.
        repeated = _repeated(shards, pl.col("response_tokens", "response_chars"))
        if repeated > limits.duplicate_share * responses:
            repeated = _repeated(shards, pl.col("token_ids").hash())
        yield _Measure(
            "duplicate_share",
            repeated / responses,
            f"{_share(repeated, responses, 'responses')} repeat another response of their prompt: raise "
            "generate.temperature or generate.top_p, or lower generate.samples; mine.drop_duplicates=true counts equal "
            "ones once",
        )


def _repeated(shards: list[Path], values: pl.Expr) -> int:
    """Responses with the values of an earlier one of their prompt. All responses of a prompt are in one shard."""
    repeated = 0
    for shard in shards:
        rows = pl.scan_parquet(shard, glob=False).select("prompt_id", values).collect()
        repeated += rows.height - rows.n_unique()
    return repeated


def _of_score(job: Any, result: StageResult, limits: WarningsConfig) -> Iterator[_Measure]:
    counts = result.counts
    spread, dtype = counts.get("reward_std"), counts.get("dtype")
    if spread is None or limits.rounding_share is None:
        return
    gate = counts.get("policy_logps_gate") or {}
    measured = gate.get("share") or 0.0
    rounding = 0.0
    if dtype in _UNIT_ROUNDOFF:
        scores = [file for file, _ in result.files if file.name.startswith("scores-")]
        rounding = job.beta * _UNIT_ROUNDOFF[dtype] * _size_of_sums(scores)
    share = max(measured, rounding / spread) if spread else 1.0
    yield _Measure(
        "rounding_share",
        share,
        f"the reward's standard deviation is {spread:.3g}, and rounding in {dtype or 'its dtype'} leaves "
        f"{max(rounding, measured * spread):.2g} of it uncertain: pairs are partly picked by rounding. Set "
        "model.dtype=float32; if the spread is small because policy and reference hardly differ, train the policy "
        "longer before it rewards its own answers",
    )


def _size_of_sums(shards: list[Path]) -> float:
    """√(mean(log π² + log π_ref²)) over the responses whose sums are finite, in nats; 0 without one."""
    squares = sum((pl.col(name).cast(pl.Float64) ** 2 for name in ("logp", "ref_logp")), pl.lit(0.0))
    scores = pl.scan_parquet(shards, glob=False).select(squares.alias("squares"))
    mean = scores.filter(pl.col("squares").is_finite()).mean().collect().item()
    return math.sqrt(mean or 0.0)


def _of_mine(job: Any, result: StageResult, limits: WarningsConfig) -> Iterator[_Measure]:
    del job, limits
    return _of_mining(result.counts, result.counts.get("debias", "none"))


def _of_mining(summary: dict[str, Any], debias: str) -> Iterator[_Measure]:
    dropped: dict[str, int] = summary.get("dropped_prompts", {})
    prompts = summary.get("prompts") or 0
    if prompts:
        without = sum(dropped.values())
        text = f"{_share(without, prompts, 'prompts')} give no pair"
        yield _Measure("no_pair_share", without / prompts, f"{text}{_why_no_pair(summary)}")
    correlation = summary.get("reward_length_correlation_after")
    if correlation is not None:
        ways = "linear, bucket or matched" if debias == "none" else "bucket or matched"
        yield _Measure(
            "length_correlation",
            abs(correlation),
            f"with debias {debias}, score and length are still correlated ({correlation:+.2f}; "
            f"{summary.get('reward_length_correlation_before') or 0.0:+.2f} before): pairs teach a length beside the "
            f"reward. Try debias {ways} (mine.debias), or min_length and max_length",
        )


def _why_no_pair(summary: dict[str, Any]) -> str:
    """The most frequent reason, and what to do."""
    reasons: dict[str, int] = summary["dropped_prompts"]
    reason = max(reasons, key=lambda name: reasons[name], default="")
    rows: dict[str, int] = {name: n for name, n in summary.get("dropped", {}).items() if name != "too_few_responses"}
    if reason == "too_few_responses":
        row = max(rows, key=lambda name: rows[name], default="")
        if not rows.get(row):
            return ", most of them since they have too few responses: raise generate.samples, or lower min_responses"
        return f", most of them since too few responses are usable ({rows[row]:,} {_ROWS.get(row, row)})"
    return _PROMPTS.get(reason, "")


_ROWS = {
    "truncated": "were cut off: raise generate.max_new_tokens",
    "duplicate": "repeat another one: raise generate.temperature",
    "too_short": "are shorter than min_length: lower it, or see why responses are empty",
    "too_long": "are longer than max_length: raise it",
    "not_finite": "have a reward that is not finite: look at their log-probabilities in the scores",
    "null": "have no reward or no length",
}
"""Why responses are not used, by the miner's name of the reason."""
_PROMPTS = {
    "tied": ", most of them since their responses have equal rewards: raise generate.temperature",
    "no_contrast": ", most of them since no response that may be chosen beats one that may be rejected: set "
    "chosen_from and rejected_from to any",
    "no_match": ", most of them since no two responses are of nearly equal length: raise length_tolerance or "
    "length_ratio, or sample more responses (generate.samples)",
}


def _of_replay(job: Any, result: StageResult, limits: WarningsConfig) -> Iterator[_Measure]:
    del job, limits
    counts = result.counts
    lacking = (counts.get("shortfall") or {}).get("replay", 0) + counts.get("left_out", 0)
    requested = (counts.get("replay") or 0) + lacking
    if requested:
        yield _Measure(
            "replay_shortfall",
            lacking / requested,
            f"{_share(lacking, requested, 'replay pairs')} could not be had: give more offline pairs, on prompts that "
            "are not mined (data.replay, replay.buffers), or lower replay.gamma",
        )


def _of_inspect(job: Any, result: StageResult, limits: WarningsConfig) -> Iterator[_Measure]:
    del job, limits
    difference, spread = result.counts.get("largest_difference"), result.counts.get("reward_std")
    if difference is not None and spread:
        yield _Measure(
            "credit_difference",
            difference / spread,
            f"the rewards by token of a pair differ by up to {difference:.3g} from the rewards that it was mined by, "
            f"whose standard deviation is {spread:.3g}: the same models were run in other batches, or the policy's "
            "log-probabilities are those of the sampling engine. Set model.dtype=float32, or "
            "score.policy_logps=recompute",
        )


def _of_train(job: Any, result: StageResult, limits: WarningsConfig) -> Iterator[_Measure]:
    del job, limits
    logps, change = result.counts.get("final_chosen_logps"), result.counts.get("final_chosen_change")
    if logps is None or change is None:
        return
    before = logps - change
    if before < 0:
        yield _Measure(
            "chosen_logps_fall",
            change / before,
            f"in training the log-probability of the chosen responses fell by {change / before:.0%} ({before:.4g} to "
            f"{logps:.4g} nats a response): the policy also leaves what it should prefer. Set train.sft_weight (the "
            "NLL of the chosen), lower train.learning_rate, or raise beta",
        )


def _share(part: int, total: int, noun: str) -> str:
    return f"{part:,} of {total:,} {noun} ({part / total:.0%})"


_MEASURES: dict[str, Callable[[Any, Any, WarningsConfig], Iterator[_Measure]]] = {
    "generate": _of_generate,
    "score": _of_score,
    "mine": _of_mine,
    "replay": _of_replay,
    "inspect": _of_inspect,
    "train": _of_train,
}
"""By stage, its measures with their names and sentences."""
