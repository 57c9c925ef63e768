"""The commands of single stages on files of the user's own; `dice mine` is in cli/mine.py.

Each reads the user's files, builds the stage's job, and prints its result.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import Config, Json, Out, Policy, Reference, Set, StageSeed, stage_config
from cli.output import echo_note, model_folder, print_result, run_job, write_copy
from cli.paths import check_buffers, check_oracle_prompts, check_shards, check_table
from dice_py.errors import UsageError

if TYPE_CHECKING:
    import polars as pl

    from dice_py.config.run import RunConfig
    from dice_py.config.shared import ModelConfig
    from dice_py.stages.job import StageFile


def generate(
    policy: Policy,
    prompts: Annotated[Path, typer.Option(help="Prompts: JSONL, JSON or Parquet.")],
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
    frame = read_prompts(prompts, prompt_column, **_reading(resolved))
    folder = model_folder(policy, resolved.model.policy_revision, "--policy")
    key = digest(frame.drop(PLACE).to_dict(as_series=False))
    job = GenerateJob(
        config=resolved.generate,
        models=_models(resolved, folder, out),
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


def _reading(resolved: RunConfig) -> dict[str, Any]:
    """How the rows of a user's file are read, as keywords of `read_prompts` and `read_pairs`."""
    return {"rule": resolved.data.bad_rows, "ignored": resolved.data.ignored_keys, "report": echo_note}


def _models(resolved: RunConfig, policy: Path, out: Path) -> ModelConfig:
    """The models' config, with the time that the policy's chat template prints, if it prints one."""
    from dice_py.models.template_time import FILE, with_template_time

    return with_template_time(resolved.model, policy, out / FILE, echo_note)


def score(
    generations: Annotated[list[Path], typer.Argument(help="Shards with token ids, in order.")],
    policy: Policy,
    reference: Reference,
    out: Out,
    beta: Annotated[float | None, typer.Option(help="β of the implicit reward.")] = None,
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
    )
    result = run_job(job, out, resolved.warnings)
    print_result({"files": [str(file) for file, _ in result.files]}, as_json)


def replay(
    policy: Policy,
    out: Out,
    pairs: Annotated[Path | None, typer.Option("--replay", help="Offline pairs in TRL's format.")] = None,
    buffer: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE[:SHARE], further offline pairs; the share of --replay is 1.")
    ] = None,
    mined: Annotated[
        Path | None, typer.Option(help="Mined pairs; none: a training set of offline pairs alone.")
    ] = None,
    generations: Annotated[list[Path] | None, typer.Option(help="Shards that the mined rows count through.")] = None,
    scores: Annotated[list[Path] | None, typer.Option(help="Their scores.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="The prompts artifact of `dice generate`.")] = None,
    gamma: Annotated[float | None, typer.Option(help="γ, the share of offline pairs.")] = None,
    prompt_column: Annotated[str, typer.Option(help="Prompt column of the offline pairs.")] = "prompt",
    chosen_column: Annotated[str, typer.Option(help="Chosen column of the offline pairs.")] = "chosen",
    rejected_column: Annotated[str, typer.Option(help="Rejected column of the offline pairs.")] = "rejected",
    weight_column: Annotated[str | None, typer.Option(help="Weights of the draw from --replay.")] = None,
    margin_power: Annotated[float | None, typer.Option(help="Weigh --replay by max(margin, 0)^POWER.")] = None,
    margin_column: Annotated[str | None, typer.Option(help="Margins.  [default: margin]")] = None,
    half_life: Annotated[float | None, typer.Option(help="Weigh --replay by 2^(-age/ROUNDS); needs --round.")] = None,
    round_column: Annotated[str | None, typer.Option(help="The round of a pair.  [default: round]")] = None,
    round_number: Annotated[int | None, typer.Option("--round", help="The current round, for ages.")] = None,
    stratify_by: Annotated[str | None, typer.Option(help="none, length (of the chosen, characters), source.")] = None,
    allocation: Annotated[str | None, typer.Option(help="Counts of the strata: proportional or equal.")] = None,
    source_column: Annotated[str | None, typer.Option(help="Sources.  [default: source]")] = None,
    seed: StageSeed = 0,
    config: Config = None,
    assign: Set = None,
    as_json: Json = False,
) -> None:
    """Stage 4: mix the share γ of offline pairs into the mined ones.

    Into OUT/training_set.parquet, with the reference log-probabilities that training needs.
    """
    resolved = stage_config(
        config,
        assign,
        replay__gamma=gamma,
        replay__buffers=_buffers(buffer),
        replay__margin_power=margin_power,
        replay__half_life=half_life,
        replay__stratify_by=stratify_by,
        replay__allocation=allocation,
        data__weight_column=weight_column,
        data__margin_column=margin_column,
        data__round_column=round_column,
        data__source_column=source_column,
    )
    shards = (mined, generations or [], scores or [], prompts)
    columns = {"prompt_column": prompt_column, "chosen_column": chosen_column, "rejected_column": rejected_column}
    _replay(resolved, policy, out, pairs, shards, columns, round_number, seed, as_json)


def _buffers(given: list[str] | None) -> dict[str, dict[str, Any]] | None:
    """`--buffer NAME=FILE[:SHARE]` as replay.buffers."""
    buffers: dict[str, dict[str, Any]] = {}
    for text in given or []:
        name, _, file = text.partition("=")
        start, _, share = file.rpartition(":")
        try:
            settings = {"path": start, "share": float(share)} if start else {"path": file}
        except ValueError:
            settings = {"path": file}  # the colon is part of the file's name
        if not name or not file or name in buffers:
            raise UsageError(f"--buffer {text}: write it as NAME=FILE or NAME=FILE:SHARE, each name once")
        buffers[name] = settings
    return buffers or None


def _check_replay(resolved: RunConfig, has_pairs: bool, round_number: int | None) -> None:
    """Refuses options that need others."""
    settings = resolved.replay
    if settings.buffer is not None:
        raise UsageError(
            "replay.buffer is what a run keeps of its own rounds: leave it out here (--set replay.buffer=)"
        )
    if not has_pairs and not settings.buffers:
        raise UsageError("nothing to replay from: give --replay FILE, --buffer NAME=FILE:SHARE, or both")
    if not has_pairs and (settings.margin_power or settings.half_life is not None):
        raise UsageError(
            "--margin-power and --half-life weigh the pairs of --replay, which is not given: --set "
            "replay.buffers.NAME.margin_power=… weighs those of a buffer"
        )
    half_lives = [settings.half_life, *(buffer.half_life for buffer in settings.buffers.values())]
    if round_number is None and any(half_life is not None for half_life in half_lives):
        raise UsageError("a half-life also needs --round, from which the age of a pair is counted")


def _replay(
    resolved: RunConfig,
    policy: str,
    out: Path,
    pairs: Path | None,
    shards: tuple[Path | None, list[Path], list[Path], Path | None],
    columns: dict[str, Any],
    round_number: int | None,
    seed: int,
    as_json: bool,
) -> None:
    from dice_py.data import read_pairs
    from dice_py.runs.own_data import pool_columns
    from dice_py.stages.replay import ReplayJob
    from dice_py.storage.keys import file_digest

    mined, generations, scores, prompts = shards
    _check_replay(resolved, pairs is not None, round_number)
    check_shards(shards)
    files = {} if pairs is None else {"replay": pairs}
    files |= check_buffers(resolved.replay.buffers)
    pool = pool_columns(resolved)
    frames = {
        name: read_pairs(file, current_round=round_number, **columns, **pool[name], **_reading(resolved))
        for name, file in files.items()
    }
    folder = model_folder(policy, resolved.model.policy_revision, "--policy")
    contents = {name: file_digest(file) for name, file in files.items()}
    buffers = {
        name: write_copy(
            out / ("offline.parquet" if name == "replay" else f"buffer-{name}.parquet"), frame, key=contents[name]
        )
        for name, frame in frames.items()
    }
    job = ReplayJob(
        config=resolved.replay,
        score_config=resolved.score,
        models=_models(resolved, folder, out),
        policy=folder,
        mined=mined,
        generations=generations,
        scores=scores,
        prompts=prompts,
        offline=buffers.pop("replay", None),
        input_keys=[
            contents,
            [file_digest(file) for file in (mined, *generations, *scores, prompts) if file],
            resolved.data.model_dump(),
            columns,
        ],
        out=out,
        seed=seed,
        buffers=buffers,
        round_number=round_number,
        bad_rows=resolved.data.bad_rows,
    )
    result = run_job(job, out, resolved.warnings)
    print_result({"training_set": str(result.files[0][0]), **result.counts}, as_json)


def train(
    policy: Policy,
    training_set: Annotated[Path, typer.Option(help="The training set that `dice replay` wrote.")],
    out: Out,
    beta: Annotated[float | None, typer.Option(help="β of DPO.")] = None,
    seed: StageSeed = 0,
    config: Config = None,
    assign: Set = None,
    as_json: Json = False,
) -> None:
    """Stage 5: one DPO run, with the policy as its own reference.

    The new policy goes to OUT/model.
    """
    from dice_py.stages.train import TrainJob
    from dice_py.storage.keys import file_digest

    resolved = stage_config(config, assign, beta=beta)
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
    result = run_job(job, out, resolved.warnings)
    print_result({"model": str(job.target), **result.counts}, as_json)


def evaluate(
    policy: Policy,
    start: Annotated[str, typer.Option(help="The policy to compare with.")],
    reference: Reference,
    out: Out,
    prompts: Annotated[Path | None, typer.Option(help="Held-out prompts.")] = None,
    pairs: Annotated[Path | None, typer.Option(help="Held-out pairs in TRL's format.")] = None,
    prompt_column: Annotated[str, typer.Option(help="The prompts' column.")] = "prompt",
    chosen_column: Annotated[str, typer.Option(help="Chosen column of the pairs.")] = "chosen",
    rejected_column: Annotated[str, typer.Option(help="Rejected column of the pairs.")] = "rejected",
    world_oracle: Annotated[bool, typer.Option("--oracle", help="The prompts are the synthetic world's.")] = False,
    seed: StageSeed = 0,
    config: Config = None,
    assign: Set = None,
    as_json: Json = False,
) -> None:
    """Stage 6: response lengths and reward accuracy on held-out data.

    Into OUT/metrics.json.
    """
    from dice_py.stages.evaluate import EvaluateJob

    if prompts is None and pairs is None:
        raise UsageError("nothing to evaluate on: give --prompts, --pairs or both")
    resolved = stage_config(config, assign)
    # The data before the models, which may be long downloads.
    columns = {"prompt_column": prompt_column, "chosen_column": chosen_column, "rejected_column": rejected_column}
    frames = _read_held_out(prompts, pairs, columns, _reading(resolved))
    if world_oracle:
        check_oracle_prompts(prompts, frames[0])
    against = model_folder(reference, resolved.model.reference_revision, "--reference")
    start_folder = model_folder(start, None, "--start")
    policy_folder = model_folder(policy, resolved.model.policy_revision, "--policy")
    prompts_file, pairs_file = _write_held_out(frames, pairs, out)
    job = EvaluateJob(
        config=resolved.evaluate,
        generate_config=resolved.generate,
        score_config=resolved.score,
        models=_models(resolved, policy_folder, out),
        policy=policy_folder,
        start=start_folder,
        reference=against,
        initial_reference=against,
        prompts=prompts_file[0] if prompts_file else None,
        pairs=pairs_file[0] if pairs_file else None,
        input_keys=[file[1] if file else None for file in (prompts_file, pairs_file)],
        out=out,
        shared=out,
        seed=seed,
        max_prompt_tokens=resolved.data.max_prompt_tokens,
        judges=("oracle",) if world_oracle else (),
        devices=resolved.devices,
        bad_rows=resolved.data.bad_rows,
    )
    print_result(run_job(job, out).counts, as_json)


def _read_held_out(
    prompts: Path | None, pairs: Path | None, columns: dict[str, Any], reading: dict[str, Any]
) -> tuple[pl.DataFrame | None, pl.DataFrame | None]:
    from dice_py.data import read_pairs, read_prompts

    return (
        None if prompts is None else read_prompts(prompts, columns["prompt_column"], **reading),
        None if pairs is None else read_pairs(pairs, **columns, **reading),
    )


def _write_held_out(
    frames: tuple[pl.DataFrame | None, pl.DataFrame | None], pairs: Path | None, out: Path
) -> tuple[StageFile | None, StageFile | None]:
    """Writes the held-out prompts and pairs as artifacts in `out`; returns them with their keys."""
    from dice_py.storage.keys import digest, file_digest
    from dice_py.storage.schemas import PLACE, PROMPTS_READ

    prompts_frame, pairs_frame = frames
    prompts_file = pairs_file = None
    if prompts_frame is not None:
        key = digest(prompts_frame.drop(PLACE).to_dict(as_series=False))
        prompts_file = write_copy(out / "eval_prompts.parquet", prompts_frame, key=key, schema=PROMPTS_READ), key
    if pairs is not None and pairs_frame is not None:
        key = file_digest(pairs)
        pairs_file = write_copy(out / "eval_pairs.parquet", pairs_frame, key=key), key
    return prompts_file, pairs_file
