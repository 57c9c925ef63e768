"""Real vLLM on the CPU, killed in the middle of a shard: a resume samples the rest, and the scorer agrees on the sums.

Each call of the stage is in a spawned process, since vLLM leaves state in its process.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from tiny_generation import CPU, questions, shard
from vllm_config import PLAIN, changed_config

from dice_py.compute.stage_process import run_in_subprocess
from dice_py.config.stages import ScoreConfig
from dice_py.errors import OutOfMemoryError
from dice_py.generation.engines.vllm import VllmEngine
from dice_py.generation.journal import Journal
from dice_py.generation.shard import journal_of
from dice_py.stages.generate import GenerateJob
from dice_py.stages.score import ScoreJob
from dice_py.storage.parquet import parquet_key

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="measured with vLLM's CPU build, and a GPU is here"),
]

PROMPTS, SAMPLES = 6, 8
TOTAL = PROMPTS * SAMPLES
SHARD = TOTAL // 2
KILLED_AT = 10
# Settings of sampling that change the distribution, but not the sums, which are of the raw logits. Few rows at a time,
# so that responses end at different steps.
CONFIG = changed_config(
    PLAIN, samples=SAMPLES, temperature=0.7, top_p=0.9, shard_prompts=3, vllm={"kv_cache_gib": 0.1, "max_num_seqs": 8}
)


def generate_job(policy: Path, out: Path) -> GenerateJob:
    return GenerateJob(
        CONFIG, CPU, policy=policy, prompts=questions(PROMPTS), prompts_key="questions", out=out, seed=3,
        round_number=1, max_prompt_tokens=100,
    )  # fmt: skip


def sample_until_killed(job: GenerateJob, report: Any) -> None:
    """In a process of its own, which ends as one that the kernel kills."""

    def on_event(event: str, **fields: Any) -> None:
        report(event, **fields)
        if event == "progress" and fields["done"] >= KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)

    job.run(on_event)


def sample_counting(jobs: list[GenerateJob], report: Any) -> list[int]:
    """In a process of its own: the requests that vLLM received for each job."""
    counts: list[int] = []
    add = VllmEngine.add

    def counting_add(self: VllmEngine, requests: Any) -> None:
        counts[-1] += len(requests)
        add(self, requests)

    VllmEngine.add = counting_add  # type: ignore[method-assign]
    for job in jobs:
        counts.append(0)
        job.run(report)
    return counts


@dataclass
class Seen:
    """The stage's folders and what was in them."""

    policy: Path
    resumed: Path
    uninterrupted: Path
    shards_at_kill: list[str] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    """Responses in the shards' journals when the process was killed."""
    requested: list[int] = field(default_factory=list)
    """By the resume, and by the call that nothing interrupted."""


def journal_rows(file: Path, key: str) -> int:
    """Responses in a shard's journal. Under another key it would be emptied."""
    journal = Journal(journal_of(file), key)
    try:
        return len(journal)
    finally:
        journal.close()


def frame(folder: Path) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(file) for file in sorted(folder.glob("generations-*.parquet"))])


@pytest.fixture(scope="module")
def seen(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    base = tmp_path_factory.mktemp("resume")
    seen = Seen(llama, base / "resumed", base / "uninterrupted")
    jobs = [generate_job(llama, folder) for folder in (seen.resumed, seen.uninterrupted)]
    run = partial(run_in_subprocess, log=base / "worker.log", remedy="")
    with pytest.raises(OutOfMemoryError, match="signal 9"):
        run(partial(sample_until_killed, jobs[0]), report=lambda event, **fields: None)
    seen.shards_at_kill = sorted(file.name for file in seen.resumed.glob("*.parquet"))
    at_kill = Path(shutil.copytree(seen.resumed, base / "at-kill"))
    seen.requested = run(partial(sample_counting, jobs), report=lambda event, **fields: None)
    seen.kept = [journal_rows(at_kill / shard(n), parquet_key(seen.resumed / shard(n)) or "") for n in range(2)]
    return seen


def test_the_kill_came_in_the_middle_of_a_shard(seen: Seen) -> None:
    assert seen.shards_at_kill == []
    assert KILLED_AT <= sum(seen.kept) < TOTAL
    assert 0 < seen.kept[0] < SHARD


def test_the_resume_samples_only_the_rest(seen: Seen) -> None:
    assert seen.requested == [TOTAL - sum(seen.kept), TOTAL]
    assert sorted(file.name for file in seen.resumed.iterdir()) == [shard(0), shard(1)]


def test_the_shards_are_those_of_a_call_without_a_kill(seen: Seen) -> None:
    ours, theirs = frame(seen.resumed), frame(seen.uninterrupted)
    assert ours.height == TOTAL
    assert set(ours["finish_reason"]) == {"stop", "length"}
    assert ours.drop("sampled_logp").equals(theirs.drop("sampled_logp"))
    assert ours["sampled_logp"].to_list() == pytest.approx(theirs["sampled_logp"].to_list(), abs=1e-4)
    assert [parquet_key(seen.resumed / shard(n)) for n in range(2)] == [
        parquet_key(seen.uninterrupted / shard(n)) for n in range(2)
    ]


def score(seen: Seen, reference: Path, out: Path, policy_logps: str) -> tuple[pl.DataFrame, Any]:
    files = [seen.resumed / shard(n) for n in range(2)]
    config = ScoreConfig.model_validate({"policy_logps": policy_logps, "token_budget": 4096})
    job = ScoreJob(
        config, CPU, policy=seen.policy, reference=reference, generations=files,
        generation_keys=[parquet_key(file) or "" for file in files], out=out, beta=0.1, sampled=(True, True),
    )  # fmt: skip
    result = job.run()
    return pl.concat([pl.read_parquet(file) for file, _ in result.files if file.suffix == ".parquet"]), result.counts[
        "policy_logps_gate"
    ]


@pytest.mark.usefixtures("release_models")
def test_the_sums_that_came_with_the_samples_are_the_scorers(seen: Seen, other: Path, tmp_path: Path) -> None:
    sampled = frame(seen.resumed)["sampled_logp"]
    scored, no_gate = score(seen, other, tmp_path / "recomputed", "recompute")
    assert no_gate is None
    assert scored["logp"].to_list() == pytest.approx(sampled.to_list(), abs=1e-4)
    reused, gate = score(seen, other, tmp_path / "reused", "reuse_if_equal")
    assert gate["passed"]
    assert gate["responses"] == TOTAL
    assert gate["share"] < 1e-4  # allowed: 1e-2
    assert reused["logp"].to_list() == sampled.to_list()
    assert reused["reward"].to_list() == pytest.approx(scored["reward"].to_list(), abs=1e-5)
