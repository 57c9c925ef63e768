"""Makes the data of the sentiment task: the model's own answers, which the annotator makes offline pairs of.

DIR/data/answers/          the SFT model's answers to the offline prompts, in shards that a second call keeps
DIR/data/pairs.jsonl       offline pairs, in TRL's form
DIR/data/rounds.jsonl      prompts of the rounds
DIR/data/evaluation.jsonl  prompts of the evaluation
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.compute.stage_process import run_in_subprocess
from dice_py.config.run import RunConfig
from dice_py.data import Message, prompts_frame
from dice_py.errors import DataError
from dice_py.events import Report
from dice_py.evidence.annotator import Annotator, LabeledPair, label_pairs
from dice_py.evidence.oracle import sentiment
from dice_py.evidence.prompts import PromptSets, prompt_sets
from dice_py.evidence.settings import DataFiles, Sizes
from dice_py.models.sources import needs_conversion, resolve_model
from dice_py.stages.convert import ConvertJob
from dice_py.stages.generate import GenerateJob
from dice_py.stages.job import Job, StageResult
from dice_py.stages.registry import stage_of
from dice_py.storage.files import make_folder, write_text
from dice_py.storage.keys import seed_for
from dice_py.storage.parquet import read_parquet

_ROLE = "the evidence's model (--model)"


def data_files(out: Path) -> DataFiles:
    """Where the files of a task's data are."""
    names = ("rounds", "pairs", "evaluation")
    return DataFiles(*(out / "data" / f"{name}.jsonl" for name in names))


def run_process(job: Job, log: Path, report: Report) -> StageResult:
    """Runs a job in a process of its own, which logs to `log`."""
    make_folder(log.parent)
    result: StageResult = run_in_subprocess(job.run, log=log, remedy=stage_of(job).remedy, report=report)
    return result


def model_folder(name: str, out: Path, report: Report) -> Path:
    """The folder of the SFT model; a GGUF file is converted once, into the cache."""
    if needs_conversion(name, None, _ROLE):
        return run_process(ConvertJob(name, None, _ROLE), out / "data" / "worker.log", report).files[0][0]
    return resolve_model(name, None, role=_ROLE, report=report)


def make_data(config: RunConfig, sizes: Sizes, annotator: Annotator, out: Path, report: Report) -> list[LabeledPair]:
    """Writes the files of `data_files(out)`; answers that are there are kept.

    Args:
        config: of the runs: its model, seed, sampling and devices.

    Returns:
        The offline pairs.

    Raises:
        DataError: the model's answers make no pair.
    """
    sets = prompt_sets(sizes.offline_prompts, sizes.rounds * sizes.round_prompts, sizes.evaluation_prompts, config.seed)
    files = data_files(out)
    make_folder(files.pairs.parent)
    answers = _answers(config, sizes, sets, out, report)
    pairs = label_pairs(answers, sets.offline, annotator, config.seed)
    if not pairs:
        raise DataError(
            f"no two of the model's answers to a prompt ended within {config.generate.max_new_tokens} tokens, so there "
            "are no offline pairs: raise generate.max_new_tokens, or use another model"
        )
    _write(files.rounds, ({"prompt": prompt} for prompt in sets.rounds))
    _write(files.evaluation, ({"prompt": prompt} for prompt in sets.evaluation))
    _write(files.pairs, pairs)
    return pairs


def _answers(config: RunConfig, sizes: Sizes, sets: PromptSets, out: Path, report: Report) -> pl.DataFrame:
    """The SFT model's answers to the offline prompts, with the oracle's `score`."""
    assert config.model.sft is not None
    job = GenerateJob(
        config=config.generate.model_copy(update={"samples": sizes.offline_samples}),
        models=config.model,
        policy=model_folder(config.model.sft, out, report),
        prompts=prompts_frame(_asked(sets.offline)),
        prompts_key="",  # the shards' keys hold the prompts
        out=out / "data" / "answers",
        seed=seed_for(config.seed, "offline answers"),
        round_number=0,
        max_prompt_tokens=config.data.max_prompt_tokens,
        devices=config.devices,
    )
    report("stage", stage="offline answers", status="running")
    result = run_process(job, job.out / "worker.log", report)
    return with_scores(pl.concat([read_parquet(file) for file, _ in result.files]))


def with_scores(answers: pl.DataFrame) -> pl.DataFrame:
    """Adds `score`, the oracle's, to a frame with `response`."""
    scores = [sentiment("", response) for response in answers["response"]]
    return answers.with_columns(score=pl.Series(scores, dtype=pl.Float64))


def _asked(prompts: Sequence[str]) -> Iterable[list[Message]]:
    return ([Message(role="user", content=prompt)] for prompt in prompts)


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
