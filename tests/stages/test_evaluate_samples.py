"""The evaluation of tiny models on prompts: samples that are kept, KL, judges that fail, and what is made once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import polars as pl
import pytest
from damage import notes
from own_run import Events
from tiny_sets import CPU

from dice_py.config.stages import EvaluateConfig, GenerateConfig, ScoreConfig
from dice_py.errors import JudgeError
from dice_py.evaluation.judges.base import ScoringJudge
from dice_py.evaluation.sample_logps import sample_logps
from dice_py.events import Report, no_report
from dice_py.stages import evaluate as stage
from dice_py.stages.evaluate import EvaluateJob
from dice_py.stages.job import StageResult
from dice_py.storage.parquet import write_parquet
from dice_py.storage.schemas import EVALUATED_SAMPLES, PROMPTS


@dataclass(frozen=True)
class ByLength(ScoringJudge):
    """Likes long responses, if it can be reached."""

    name: ClassVar[str] = "length"
    is_down: bool = False

    def key_fields(self) -> dict[str, Any]:
        return {"likes": "length"}

    def scores(self, prompts: pl.DataFrame, samples: pl.DataFrame, report: Report = no_report) -> pl.Series:
        if self.is_down:
            raise JudgeError("no answer; start it again")
        return samples["response"].str.len_chars().cast(pl.Float64)


@pytest.fixture
def job(llama: Path, other: Path, tmp_path: Path) -> EvaluateJob:
    """A new policy and the start that it came from; no round before."""
    prompts = pl.DataFrame(
        {"prompt_id": range(5), "messages": [[{"role": "user", "content": f"question {n}"}] for n in range(5)]},
        schema=PROMPTS,
    )
    return EvaluateJob(
        EvaluateConfig(samples=3),
        GenerateConfig(engine="transformers", max_new_tokens=12, temperature=1.0),
        ScoreConfig(),
        CPU,
        policy=llama,
        start=other,
        previous=other,
        previous_samples=tmp_path / "before",
        reference=other,
        initial_reference=other,
        prompts=write_parquet(tmp_path / "prompts.parquet", prompts, key="prompts"),
        pairs=None,
        input_keys=["prompts", None],
        out=tmp_path / "out",
        shared=tmp_path / "shared",
        seed=0,
        max_prompt_tokens=100,
        judges=(),
    )


def written(job: EvaluateJob) -> pl.DataFrame:
    return pl.read_parquet(job.out / "samples.parquet")


def test_samples_are_kept_with_their_log_probabilities(job: EvaluateJob, llama: Path, other: Path) -> None:
    result = job.run()
    kept = written(job)
    assert kept.schema == EVALUATED_SAMPLES
    assert kept["messages"][4][0]["content"] == "question 1"
    raw = pl.read_parquet(job.out / "samples" / "*.parquet")
    for column, model in (
        ("sampled_logp", llama),
        ("ref_logp", other),
        ("previous_logp", other),
        ("start_logp", other),
    ):
        scored = sample_logps(model, CPU, ScoreConfig(), raw)
        assert kept[column].to_list() == pytest.approx(scored.to_list(), abs=1e-3)
    assert kept["log_ratio"].to_list() == (kept["sampled_logp"] - kept["ref_logp"]).to_list()
    metrics = result.counts
    assert (metrics["eval_prompts"], metrics["eval_samples"]) == (5, 3)
    assert metrics["kl_to_previous"] == metrics["kl_to_start"] == pytest.approx(kept["log_ratio"].mean())
    assert metrics["kl_to_start"] > 0.0
    assert "kl_and_entropy" not in metrics  # temperature 1, no truncation
    assert metrics["entropy_per_token"] == pytest.approx(-kept["sampled_logp"].sum() / kept["response_tokens"].sum())
    assert (job.out / "samples.parquet") in [file for file, _ in result.files]
    assert job.incomplete(result.files) == []
    (job.out / "samples.parquet").unlink()
    assert job.incomplete(result.files) == [job.out / "samples.parquet"]


def test_each_model_passes_over_the_samples_once(
    job: EvaluateJob, llama: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[Path] = []

    def counted(folder: Path, *rest: Any) -> pl.Series:
        passes.append(folder)
        return sample_logps(folder, *rest)

    monkeypatch.setattr(stage, "sample_logps", counted)
    first = job.run().counts
    assert passes == [other]  # the reference, the round before and the start; none of the policy
    passes.clear()
    recomputed = replace(job, score_config=ScoreConfig(policy_logps="recompute")).run().counts
    assert passes == [other, llama]
    assert recomputed["kl_to_start"] == pytest.approx(first["kl_to_start"], abs=1e-4)
    passes.clear()
    # Against the first reference, and a start that is not scored.
    job = replace(job, reference=llama, score_config=ScoreConfig(allow_same_model=True))
    without = replace(job, previous=llama, config=EvaluateConfig(samples=3, kl_to_start=False))
    found = without.run().counts
    assert passes == [llama]
    assert "kl_to_start" not in found
    assert found["kl_to_previous"] == pytest.approx(0.0, abs=1e-4)
    assert written(without)["start_logp"].null_count() == 15


def test_the_kl_from_the_first_reference(job: EvaluateJob, llama: Path, other: Path) -> None:
    # The start is the policy itself, so that the pass over the first reference is needed by no other metric.
    own = replace(job, start=llama, previous=llama, reference=llama, score_config=ScoreConfig(allow_same_model=True))
    asked = replace(own, config=EvaluateConfig(samples=3, kl_to_reference=True))
    found = asked.run().counts
    raw = pl.read_parquet(job.out / "samples" / "*.parquet")
    expected = (raw["sampled_logp"] - sample_logps(other, CPU, ScoreConfig(), raw)).mean()
    assert found["kl_to_initial_reference"] == pytest.approx(expected, abs=1e-3)
    assert found["kl_to_initial_reference"] > 0.1 > found["kl_to_start"]
    low, high = found["kl_to_initial_reference_ci95"]
    assert low < found["kl_to_initial_reference"] < high
    assert written(asked)["initial_ref_logp"].null_count() == 0
    assert asked.key() != own.key()
    assert "kl_to_initial_reference" not in own.run().counts


def test_lengths_are_kept_by_prompt(job: EvaluateJob) -> None:
    metrics = job.run().counts
    lengths = pl.read_parquet(job.values_file).filter(pl.col("metric") == "mean_response_tokens")
    assert sorted(lengths["item"]) == list(range(5))
    assert lengths["value"].mean() == pytest.approx(metrics["mean_response_tokens"])
    assert lengths["start"].mean() == pytest.approx(metrics["start_mean_response_tokens"])


def test_samples_of_the_round_before_are_taken_from_its_folder(job: EvaluateJob, llama: Path) -> None:
    before = replace(job, policy=llama, out=job.out.parent / "first")
    before.run()
    second = replace(job, previous=llama, previous_samples=before.out / "samples", judges=(ByLength(),))
    stamp = [(file, file.stat().st_mtime_ns) for file in (before.out / "samples").glob("*.parquet")]
    assert stamp
    metrics = second.run().counts
    assert [(file, file.stat().st_mtime_ns) for file, _ in stamp] == stamp
    # The policy against itself, on the same random numbers: every sample ties with its double.
    assert metrics["length_win_rate_previous"] == 0.5
    assert metrics["length_win_rate"] != 0.5


def test_a_tempered_distribution_is_said(job: EvaluateJob) -> None:
    events = Events()
    sampling = job.generate_config.model_copy(update={"temperature": 0.7, "top_p": 0.9})
    metrics = replace(job, generate_config=sampling).run(events).counts
    assert "truncated distribution (temperature 0.7, top_p 0.9)" in metrics["kl_and_entropy"]
    assert metrics["kl_and_entropy"] in notes(events)


def failures(job: EvaluateJob) -> tuple[StageResult, EvaluateJob]:
    down = replace(job, judges=(ByLength(is_down=True),))
    return down.run(), down


def test_a_judge_that_fails_leaves_its_metrics_out(job: EvaluateJob) -> None:
    result, down = failures(job)
    assert result.counts["judge_failures"] == {"length": "no answer; start it again"}
    assert "length_win_rate" not in result.counts
    assert result.counts["kl_to_start"] > 0
    # It is asked again by the next call, which keeps the samples.
    assert down.incomplete(result.files) == [job.out / "metrics.json"]
    stamp = (job.out / "samples").stat().st_mtime_ns
    up = replace(down, judges=(ByLength(),))
    assert up.key() == down.key()
    again = up.run()
    assert "judge_failures" not in again.counts
    assert 0.0 <= again.counts["length_win_rate"] <= 1.0
    assert up.incomplete(again.files) == []
    assert (job.out / "samples").stat().st_mtime_ns == stamp
    assert {name: value for name, value in again.counts.items() if name in result.counts} == {
        name: value for name, value in result.counts.items() if name != "judge_failures"
    }


def test_a_judge_by_which_rounds_are_compared_must_not_fail(job: EvaluateJob) -> None:
    with pytest.raises(JudgeError, match="no answer"):
        replace(job, judges=(ByLength(is_down=True),), needed_judge="length").run()


def test_the_key_has_what_decides_the_metrics(job: EvaluateJob, llama: Path) -> None:
    key = job.key()
    assert replace(job, judges=(ByLength(),)).key() != key
    assert replace(job, previous=llama).key() != key
    assert replace(job, needed_judge="length", previous_samples=job.out).key() == key
    config = EvaluateConfig(samples=3, command=["program"], command_timeout=5.0, command_folder="/")
    assert replace(job, config=config).key() == key  # they are the benchmark's
    assert replace(job, config=EvaluateConfig(samples=3, kl_to_start=False)).key() != key
