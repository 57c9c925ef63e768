"""Measures the two policies that a run starts from, as a round's is: the SFT model, and π_1 that round 0 made of it.

It is the evaluate stage once more, of π_1 against the SFT model: its KL from the start is the KL from the SFT model.
π_1's samples are the ones that the run has drawn.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.config.run import RunConfig
from dice_py.evaluation.judges.registry import build_judges
from dice_py.evaluation.samples import mean_ci95, sample_metrics
from dice_py.events import Report
from dice_py.evidence.data import model_folder, run_process, with_scores
from dice_py.runs.folder import round_name
from dice_py.stages.evaluate import EvaluateJob
from dice_py.storage.files import make_folder, read_sealed, write_sealed
from dice_py.storage.keys import seed_for
from dice_py.storage.parquet import parquet_key, read_parquet

SHARDS = "generations-*.parquet"
FILES = "files.json"
"""The files of the evaluation, with their keys."""


def evaluate_start(config: RunConfig, run: Path, out: Path, report: Report) -> dict[str, Any]:
    """The metrics of π_1 against the SFT model; kept in `out/start`.

    Args:
        config: of the run.
        run: the folder of a complete run, any arm's.

    Raises:
        DataError: a judge failed.
    """
    assert config.model.sft is not None
    sft, prompts = model_folder(config.model.sft, out, report), run / "inputs" / "eval_prompts.parquet"
    job = EvaluateJob(
        config=config.evaluate,
        generate_config=config.generate,
        score_config=config.score,
        models=config.model,
        policy=run / round_name(0) / "train" / "model",
        start=sft,
        previous=sft,
        previous_samples=out / "start" / "start",
        reference=sft,
        initial_reference=sft,
        prompts=prompts,
        pairs=None,
        input_keys=[parquet_key(prompts), None],
        out=out / "start" / "evaluate",
        shared=out / "start",
        seed=seed_for(config.seed, "evaluate"),
        max_prompt_tokens=config.data.max_prompt_tokens,
        judges=build_judges(config.evaluate.judges, config.model, config.is_world),
        devices=config.devices,
        needed_judge="function",
    )
    kept, made = read_sealed(job.out / "metrics.json", job.key()), read_sealed(job.shared / FILES, job.key())
    if kept and made and not job.incomplete([(job.shared / file, key) for file, key in made["files"]]):
        return kept
    _copy_samples(run / "evaluate" / "start", job.out / "samples")
    report("stage", stage="evaluation of π_1", status="running")
    result = run_process(job, job.out / "worker.log", report)
    files = [[str(file.relative_to(job.shared)), key] for file, key in result.files]
    write_sealed(job.shared / FILES, {"files": files}, job.key())
    return result.counts


def _copy_samples(source: Path, target: Path) -> None:
    """Copies the run's samples of π_1 to where the job looks for them; it draws what is not there, or another's."""
    make_folder(target)
    for shard in source.glob(SHARDS):
        shutil.copyfile(shard, target / shard.name)


def folder_samples(folder: Path) -> pl.DataFrame | None:
    """The samples in the shards of a folder, with the oracle's `score`; None if there are none."""
    shards = sorted(folder.glob(SHARDS))
    return with_scores(pl.concat([read_parquet(shard) for shard in shards])) if shards else None


def sft_metrics(samples: pl.DataFrame, start: dict[str, Any], seed: int) -> dict[str, Any]:
    """The metrics of the SFT model, of its samples, as the evaluation of a round names them.

    Args:
        samples: of `folder_samples`.
        start: the metrics of π_1 against it, whose win rate is turned round.
        seed: of the bootstrap.
    """
    low, high = start["function_win_rate_ci95"]
    return {
        **sample_metrics(samples, seed),
        "function_score": samples["score"].mean(),
        "function_score_ci95": mean_ci95(samples["prompt_id"], samples["score"], seed),
        "kl_to_initial_reference": 0.0,
        "kl_to_initial_reference_ci95": None,
        "function_win_rate": 1.0 - start["function_win_rate"],
        "function_win_rate_ci95": [1.0 - high, 1.0 - low],
    }


def start_metrics(start: dict[str, Any]) -> dict[str, Any]:
    """The metrics of π_1, of its evaluation against the SFT model, as if it were compared with itself."""
    return {
        **start,
        "kl_to_start": 0.0,
        "kl_to_start_ci95": None,
        "function_win_rate": 0.5,
        "function_win_rate_ci95": None,
    }
