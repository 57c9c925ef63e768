"""The commands of single stages on files of the user's own; those of mining and replay have files of their own.

Each reads the user's files, builds the stage's job, and prints its result.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import Config, Json, Method, Out, Policy, Reference, Set, StageSeed, stage_config
from cli.output import (
    echo_note,
    echo_warnings,
    model_folder,
    models_at,
    pairs_key,
    print_result,
    prompt_settings,
    reading,
    run_job,
    write_copy,
)
from cli.paths import check_oracle_prompts, check_table
from dice_py.errors import UsageError

if TYPE_CHECKING:
    import polars as pl

    from dice_py.config.run import RunConfig
    from dice_py.rows.sources import Source
    from dice_py.stages.job import StageFile


def generate(
    policy: Policy,
    prompts: Annotated[Path, typer.Option(help="Prompts: a file, folder, pattern or hub id (docs/data.md).")],
    out: Out,
    prompt_column: Annotated[str, typer.Option(help="The prompts' column.")] = "prompt",
    samples: Annotated[int | None, typer.Option(help="K, responses per prompt.")] = None,
    engine: Annotated[str | None, typer.Option(help="auto, transformers or vllm.")] = None,
    seed: StageSeed = 0,
    config: Config = None,
    assign: Set = None,
    as_json: Json = False,
) -> None:
    """Stage 1: sample K responses per prompt.

    Into OUT/generations-NNNNN.parquet. Shards that are there already, from the same inputs, are kept.
    """
    from dice_py.data import read_prompts
    from dice_py.stages.generate import GenerateJob
    from dice_py.storage.keys import digest
    from dice_py.storage.schemas import PLACE, PROMPTS_READ

    resolved = stage_config(config, assign, generate__samples=samples, generate__engine=engine)
    # Before the model, which may be a long download.
    frame = prompt_settings(resolved).of_prompts(read_prompts(prompts, prompt_column, **reading(resolved)))
    folder = model_folder(policy, resolved.model.policy_revision, "--policy")
    key = digest(frame.drop(PLACE).to_dict(as_series=False))
    job = GenerateJob(
        config=resolved.generate,
        models=models_at(resolved, folder, out),
        policy=folder,
        prompts=write_copy(out / "prompts.parquet", frame, key=key, schema=PROMPTS_READ),
        prompts_key=key,
        out=out,
        seed=seed,
        round_number=1,
        max_prompt_tokens=resolved.data.max_prompt_tokens,
        devices=resolved.devices,
        bad_rows=resolved.data.bad_rows,
        is_alone=True,
    )
    result = run_job(job, out, resolved.warnings)
    print_result({"files": [str(file) for file, _ in result.files], **result.counts}, as_json)


def score(
    generations: Annotated[list[Path], typer.Argument(help="Shards with token ids, in order.")],
    policy: Policy,
    reference: Reference,
    out: Out,
    beta: Annotated[float | None, typer.Option(help="β of the implicit reward.")] = None,
    previous: Annotated[
        str | None, typer.Option(help="An earlier policy: adds previous_reward, against the same reference.")
    ] = None,
    prompt_tokens_column: Annotated[str, typer.Option(help="Column of prompt token ids.")] = "prompt_token_ids",
    tokens_column: Annotated[str, typer.Option(help="Column of response token ids.")] = "token_ids",
    config: Config = None,
    assign: Set = None,
    as_json: Json = False,
) -> None:
    """Stage 2: implicit rewards β·(log π − log π_ref).

    Of stored token ids, into OUT/scores-NNNNN.parquet, row by row beside the generations.
    """
    from dice_py.stages.score import ScoreJob
    from dice_py.storage.keys import file_digest

    resolved = stage_config(config, assign, beta=beta)
    for file in generations:
        check_table(file, "GENERATIONS", (prompt_tokens_column, tokens_column), "dice generate")
    job = ScoreJob(
        config=resolved.score,
        models=resolved.model,
        generations=generations,
        # By content: a file of the user's own has no key that could be trusted.
        generation_keys=[file_digest(file) for file in generations],
        policy=model_folder(policy, resolved.model.policy_revision, "--policy"),
        reference=model_folder(reference, resolved.model.reference_revision, "--reference"),
        out=out,
        beta=resolved.beta,
        devices=resolved.devices,
        prompt_column=prompt_tokens_column,
        response_column=tokens_column,
        previous=None if previous is None else (model_folder(previous, None, "--previous"), "policy"),
    )
    result = run_job(job, out, resolved.warnings)
    print_result({"files": [str(file) for file, _ in result.files]}, as_json)


def train(
    policy: Policy,
    training_set: Annotated[Path, typer.Option(help="The training set that `dice replay` wrote.")],
    out: Out,
    beta: Annotated[float | None, typer.Option(help="β of DPO.")] = None,
    method: Method = None,
    seed: StageSeed = 0,
    config: Config = None,
    assign: Set = None,
    as_json: Json = False,
) -> None:
    """Stage 5: one run of DPO or another method.

    The new policy goes to OUT/model; with train.lora, the adapter that was merged into it to OUT/adapter. The reference
    is that of the training set: the policy itself, unless it was made with another.
    """
    from dice_py.reporting.tracking.session import places_alone
    from dice_py.stages.train import TrainJob
    from dice_py.storage.keys import file_digest

    resolved = stage_config(config, assign, beta=beta, train__method=method)
    columns = ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps")
    check_table(training_set, "--training-set", columns, "dice replay")
    job = TrainJob(
        config=resolved.train,
        models=resolved.model,
        training_set=training_set,
        training_set_key=file_digest(training_set),
        policy=model_folder(policy, resolved.model.policy_revision, "--policy"),
        out=out,
        beta=resolved.beta,
        seed=seed,
        devices=resolved.devices,
    )
    with places_alone(out):
        result = run_job(job, out, resolved.warnings)
    made = {"model": str(job.target)}
    if resolved.train.lora is not None and job.adapter.is_dir():
        made["adapter"] = str(job.adapter)
    print_result({**made, **result.counts}, as_json)


def evaluate(
    policy: Policy,
    start: Annotated[str, typer.Option(help="The policy to compare with.")],
    reference: Reference,
    out: Out,
    previous: Annotated[
        str | None, typer.Option(help="The policy of the round before; default: the one to compare with.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Held-out prompts: a file, folder, pattern or hub id.")] = None,
    pairs: Annotated[Path | None, typer.Option(help="Held-out pairs, likewise.")] = None,
    prompt_column: Annotated[str, typer.Option(help="The prompts' column.")] = "prompt",
    chosen_column: Annotated[str, typer.Option(help="Chosen column of the pairs.")] = "chosen",
    rejected_column: Annotated[str, typer.Option(help="Rejected column of the pairs.")] = "rejected",
    world_oracle: Annotated[bool, typer.Option("--oracle", help="The prompts are the synthetic world's.")] = False,
    seed: StageSeed = 0,
    config: Config = None,
    assign: Set = None,
    as_json: Json = False,
) -> None:
    """Stage 6: win rates, accuracies, KL on held-out data.

    Into OUT/metrics.json, and the samples into OUT/samples.parquet. Judges are those of evaluate.judges in the config.
    """
    from dice_py.evaluation.judges.registry import build_judges
    from dice_py.rows.sources import find_source
    from dice_py.stages.evaluate import EvaluateJob

    if prompts is None and pairs is None:
        raise UsageError("nothing to evaluate on: give --prompts, --pairs or both")
    resolved = stage_config(config, assign)
    # The data before the models, which may be long downloads.
    columns = {"prompt_column": prompt_column, "chosen_column": chosen_column, "rejected_column": rejected_column}
    sources = [None if name is None else find_source(name, echo_note) for name in (prompts, pairs)]
    frames = _read_held_out(sources[0], sources[1], columns, resolved)
    if world_oracle:
        check_oracle_prompts(prompts, frames[0])
    against = model_folder(reference, resolved.model.reference_revision, "--reference")
    start_folder = model_folder(start, None, "--start")
    policy_folder = model_folder(policy, resolved.model.policy_revision, "--policy")
    prompts_file, pairs_file = _write_held_out(frames, sources[1], out, resolved)
    job = EvaluateJob(
        config=resolved.evaluate,
        generate_config=resolved.generate,
        score_config=resolved.score,
        models=models_at(resolved, policy_folder, out),
        policy=policy_folder,
        start=start_folder,
        previous=start_folder if previous is None else model_folder(previous, None, "--previous"),
        previous_samples=out / "previous",
        reference=against,
        initial_reference=against,
        prompts=prompts_file[0] if prompts_file else None,
        pairs=pairs_file[0] if pairs_file else None,
        input_keys=[file[1] if file else None for file in (prompts_file, pairs_file)],
        out=out,
        shared=out,
        seed=seed,
        max_prompt_tokens=resolved.data.max_prompt_tokens,
        judges=build_judges(resolved.evaluate.judges, resolved.model, world_oracle),
        devices=resolved.devices,
        bad_rows=resolved.data.bad_rows,
    )
    metrics = dict(run_job(job, out, resolved.warnings).counts)
    if resolved.evaluate.command is not None:
        metrics |= _benchmark(resolved, policy_folder, out)
    print_result(metrics, as_json)


def _benchmark(resolved: RunConfig, policy: Path, out: Path) -> dict[str, float]:
    """The numbers of evaluate.command on a policy; a failure is a warning."""
    from dice_py.runs.warnings import stage_warnings
    from dice_py.stages.benchmark import BenchmarkJob, benchmark_metrics, check_command

    config = resolved.evaluate
    assert config.command is not None
    folder = Path(config.command_folder or ".").absolute()
    check_command(config.command, folder)
    job = BenchmarkJob(policy.absolute(), tuple(config.command), folder, config.command_timeout, out / "benchmark")
    result = job.run(echo_note)
    echo_warnings(stage_warnings("benchmark", job, result, resolved.warnings))
    return benchmark_metrics(result.counts)


def _read_held_out(
    prompts: Source | None, pairs: Source | None, columns: dict[str, Any], resolved: RunConfig
) -> tuple[pl.DataFrame | None, pl.DataFrame | None]:
    from dice_py.data import read_pairs, read_prompts

    settings, rows = prompt_settings(resolved), reading(resolved)
    return (
        None if prompts is None else settings.of_prompts(read_prompts(prompts, columns["prompt_column"], **rows)),
        None if pairs is None else settings.of_pairs(read_pairs(pairs, **columns, **rows)),
    )


def _write_held_out(
    frames: tuple[pl.DataFrame | None, pl.DataFrame | None], pairs: Source | None, out: Path, resolved: RunConfig
) -> tuple[StageFile | None, StageFile | None]:
    """Writes the held-out prompts and pairs as artifacts in `out`; returns them with their keys."""
    from dice_py.storage.keys import digest
    from dice_py.storage.schemas import PLACE, PROMPTS_READ

    prompts_frame, pairs_frame = frames
    prompts_file = pairs_file = None
    if prompts_frame is not None:
        key = digest(prompts_frame.drop(PLACE).to_dict(as_series=False))
        prompts_file = write_copy(out / "eval_prompts.parquet", prompts_frame, key=key, schema=PROMPTS_READ), key
    if pairs is not None and pairs_frame is not None:
        key = pairs_key(resolved, pairs)
        pairs_file = write_copy(out / "eval_pairs.parquet", pairs_frame, key=key), key
    return prompts_file, pairs_file
