"""`dice replay`: mixes offline pairs into mined ones, and adds the log-probabilities that training needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import Config, Json, Out, Policy, Set, StageSeed, stage_config
from cli.output import (
    echo_note,
    model_folder,
    models_at,
    pairs_key,
    print_result,
    prompt_settings,
    reading,
    run_job,
    write_copy,
)
from cli.paths import check_buffers, check_shards
from dice_py.errors import UsageError

if TYPE_CHECKING:
    import polars as pl

    from dice_py.config.run import RunConfig
    from dice_py.rows.sources import Source


def replay(
    policy: Policy,
    out: Out,
    pairs: Annotated[
        Path | None, typer.Option("--replay", help="Offline pairs: a file, folder, pattern or hub id (docs/data.md).")
    ] = None,
    buffer: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE[:SHARE], further offline pairs; the share of --replay is 1.")
    ] = None,
    mined: Annotated[
        Path | None, typer.Option(help="Mined pairs; none: a training set of offline pairs alone.")
    ] = None,
    generations: Annotated[list[Path] | None, typer.Option(help="Shards that the mined rows count through.")] = None,
    scores: Annotated[list[Path] | None, typer.Option(help="Their scores.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="The prompts artifact of `dice generate`.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="The reference of the loss (train.reference=initial); none: the policy.")
    ] = None,
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
    """Stage 4: mix the share γ of offline pairs into mined ones.

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
    _replay(resolved, policy, reference, out, pairs, shards, columns, round_number, seed, as_json)


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


def _check_replay(resolved: RunConfig, has_pairs: bool, round_number: int | None, reference: str | None) -> None:
    """Refuses options that need others."""
    settings = resolved.replay
    if resolved.train.reference == "initial" and reference is None:
        raise UsageError("train.reference is initial: name that model with --reference, or set train.reference=policy")
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
    reference: str | None,
    out: Path,
    pairs: Path | None,
    shards: tuple[Path | None, list[Path], list[Path], Path | None],
    columns: dict[str, Any],
    round_number: int | None,
    seed: int,
    as_json: bool,
) -> None:
    from dice_py.rows.sources import find_source
    from dice_py.stages.replay import ReplayJob
    from dice_py.storage.keys import file_digest

    mined, generations, scores, prompts = shards
    _check_replay(resolved, pairs is not None, round_number, reference)
    check_shards(shards)
    files = {} if pairs is None else {"replay": pairs}
    files |= check_buffers(resolved.replay.buffers)
    sources = {name: find_source(file, echo_note) for name, file in files.items()}
    frames = _read_offline(resolved, sources, columns, round_number)
    folder = model_folder(policy, resolved.model.policy_revision, "--policy")
    revision = resolved.model.reference_revision
    of_loss = None if reference is None else model_folder(reference, revision, "--reference")
    contents = {name: pairs_key(resolved, source) for name, source in sources.items()}
    buffers = {
        name: write_copy(
            out / ("offline.parquet" if name == "replay" else f"buffer-{name}.parquet"), frame, key=contents[name]
        )
        for name, frame in frames.items()
    }
    job = ReplayJob(
        config=resolved.replay,
        score_config=resolved.score,
        models=models_at(resolved, folder, out),
        policy=folder,
        mined=mined,
        generations=generations,
        scores=scores,
        prompts=prompts,
        offline=buffers.pop("replay", None),
        input_keys=[
            contents,
            [file_digest(file) for file in (mined, *generations, *scores, prompts) if file],
            resolved.data.key_dump(),
            columns,
        ],
        out=out,
        seed=seed,
        buffers=buffers,
        round_number=round_number,
        bad_rows=resolved.data.bad_rows,
        reference=of_loss,
        # The scores' reference is a model of the user's that may be another: the pairs are scored again.
        reference_scores="logp" if of_loss is None else None,
        shared_logps=resolved.train.ld_alpha is not None,
    )
    result = run_job(job, out, resolved.warnings)
    print_result({"training_set": str(result.files[0][0]), **result.counts}, as_json)


def _read_offline(
    resolved: RunConfig, sources: dict[str, Source], columns: dict[str, Any], round_number: int | None
) -> dict[str, pl.DataFrame]:
    from dice_py.data import read_pairs
    from dice_py.runs.own_data import pool_columns

    pool = pool_columns(resolved)
    settings = prompt_settings(resolved)
    return {
        name: settings.of_pairs(
            read_pairs(source, current_round=round_number, **columns, **pool[name], **reading(resolved))
        )
        for name, source in sources.items()
    }
