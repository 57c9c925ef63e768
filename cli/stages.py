"""The commands of the stages alone, on files of the user's own, and what all commands share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from dice_py.errors import UsageError

Config = Annotated[list[Path] | None, typer.Option("--config", "-c", help="YAML file; several are merged in order.")]
Set = Annotated[list[str] | None, typer.Option("--set", "-s", help="One config value: section.key=value.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else, on stdout.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Where the result goes.")]
Policy = Annotated[str, typer.Option(help="The policy: a model folder or a Hugging Face id.")]
Reference = Annotated[str, typer.Option(help="The model that the policy's DPO training started from.")]


def print_json(value: Any) -> None:
    """One JSON object on one line of stdout."""
    typer.echo(json.dumps(value, allow_nan=False))


def overrides(**values: Any) -> dict[str, Any]:
    """`model__policy="x"` and the like to nested keys; None means not given."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        if value is not None:
            section, _, key = name.partition("__")
            if key:
                nested.setdefault(section, {})[key] = value
            else:
                nested[section] = value
    return nested


def _one_stage(config: list[Path] | None, assign: list[str] | None, **options: Any) -> Any:
    from dice_py.config.loading import resolve

    return resolve(config or [], assign or [], overrides(**options), one_stage=True)


def work_apart(stage: str, work: str, folder: Path, **arguments: Any) -> Any:
    """Runs a stage in a process of its own, whose log goes to `folder`, and shows how far it is."""
    from cli.progress import Display
    from dice_py.compute.stage_process import run_stage
    from dice_py.stages.registry import REMEDIES

    with Display() as display:
        display("stage", stage=stage, status="running")
        return run_stage(work, arguments, log=folder / "worker.log", remedy=REMEDIES[stage], report=display)


def print_result(value: dict[str, Any], as_json: bool) -> None:
    """What a stage has made: one JSON object, or a line for each name."""
    if as_json:
        print_json(value)
        return
    from dice_py.reporting.formatting import number

    for name, item in value.items():
        shown = "".join(f"\n  {file}" for file in item) if name == "files" else number(item)
        typer.echo(f"{name.replace('_', ' ')}: {shown}")


def generate(
    policy: Policy,
    prompts: Annotated[Path, typer.Option(help="Prompts: JSONL, JSON or Parquet.")],
    out: Out,
    prompt_column: Annotated[str, typer.Option(help="The prompts' column.")] = "prompt",
    samples: Annotated[int | None, typer.Option(help="K, responses per prompt.")] = None,
    engine: Annotated[str | None, typer.Option(help="auto, transformers or vllm.")] = None,
    seed: Annotated[int, typer.Option(help="The seed.")] = 0,
    config: Config = None,
    assign: Set = None,
    as_json: Json = False,
) -> None:
    """Stage 1: sample K responses per prompt.

    Into OUT/generations-NNNNN.parquet; shards that are there already, from the same inputs, are kept.
    """
    from dice_py.data import read_prompts
    from dice_py.models.loading import resolve_model
    from dice_py.storage.keys import digest
    from dice_py.storage.parquet import write_parquet
    from dice_py.storage.schemas import PROMPTS

    resolved = _one_stage(config, assign, generate__samples=samples, generate__engine=engine)
    frame = read_prompts(prompts, prompt_column)  # before the model, which may be a long download
    folder = resolve_model(policy, resolved.model.policy_revision, role="--policy")
    write_parquet(out / "prompts.parquet", frame, key=digest(frame.to_dict(as_series=False)), schema=PROMPTS)
    made = work_apart(
        "generate",
        "dice_py.stages.generate:generate",
        out,
        config=resolved.generate,
        models=resolved.model,
        policy=folder,
        prompts=out / "prompts.parquet",
        out=out,
        seed=seed,
        round_number=1,
        max_prompt_tokens=resolved.data.max_prompt_tokens,
        devices=resolved.devices,
    )
    print_result({"files": [str(file) for file in made.files], **made.counts()}, as_json)


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
    from dice_py.models.loading import model_identity, resolve_model
    from dice_py.storage.keys import digest, file_digest

    resolved = _one_stage(config, assign, beta=beta)
    contents = [file_digest(file) for file in generations]
    folders = {
        "policy": resolve_model(policy, resolved.model.policy_revision, role="--policy"),
        "reference": resolve_model(reference, resolved.model.reference_revision, role="--reference"),
    }
    settings = [
        resolved.score.model_dump(),
        resolved.model.model_dump(),
        resolved.beta,
        prompt_tokens_column,
        tokens_column,
    ]
    models = [model_identity(folder) for folder in folders.values()]
    scored = work_apart(
        "score",
        "dice_py.stages.score:score",
        out,
        config=resolved.score,
        models=resolved.model,
        **folders,
        generations=generations,
        out=out,
        keys=[digest("score", content, models, settings) for content in contents],
        beta=resolved.beta,
        devices=resolved.devices,
        prompt_column=prompt_tokens_column,
        response_column=tokens_column,
    )
    print_result({"files": [str(file) for file in scored.files]}, as_json)


def _buffers(given: list[str] | None) -> dict[str, dict[str, Any]] | None:
    """`--buffer NAME=FILE[:SHARE]` as replay.buffers."""
    found: dict[str, dict[str, Any]] = {}
    for text in given or []:
        name, _, file = text.partition("=")
        start, _, share = file.rpartition(":")
        try:
            settings = {"path": start, "share": float(share)} if start else {"path": file}
        except ValueError:
            settings = {"path": file}  # the colon is the file's own
        if not name or not file or name in found:
            raise UsageError(f"--buffer {text}: write it as NAME=FILE or NAME=FILE:SHARE, each name once")
        found[name] = settings
    return found or None


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
    prompts: Annotated[Path | None, typer.Option(help="The prompts artefact of `dice generate`.")] = None,
    gamma: Annotated[float | None, typer.Option(help="γ, the share of offline pairs.")] = None,
    prompt_column: Annotated[str, typer.Option(help="Prompt column of the offline pairs.")] = "prompt",
    chosen_column: Annotated[str, typer.Option(help="Chosen column of the offline pairs.")] = "chosen",
    rejected_column: Annotated[str, typer.Option(help="Rejected column of the offline pairs.")] = "rejected",
    weight_column: Annotated[str | None, typer.Option(help="Weights of the draw from --replay.")] = None,
    margin_power: Annotated[float | None, typer.Option(help="Weigh --replay by max(margin, 0)^POWER.")] = None,
    margin_column: Annotated[str | None, typer.Option(help="Margins.  [default: margin]")] = None,
    half_life: Annotated[float | None, typer.Option(help="Weigh --replay by 2^(-age/ROUNDS); needs --round.")] = None,
    round_column: Annotated[str | None, typer.Option(help="The round a pair is of.  [default: round]")] = None,
    round_number: Annotated[int | None, typer.Option("--round", help="The current round, for ages.")] = None,
    stratify_by: Annotated[str | None, typer.Option(help="none, length (of the chosen, characters), source.")] = None,
    allocation: Annotated[str | None, typer.Option(help="Counts of the strata: proportional or equal.")] = None,
    source_column: Annotated[str | None, typer.Option(help="Sources.  [default: source]")] = None,
    seed: Annotated[int, typer.Option(help="The seed.")] = 0,
    config: Config = None,
    assign: Set = None,
    as_json: Json = False,
) -> None:
    """Stage 4: mix the share γ of offline pairs into the mined ones.

    Into OUT/training_set.parquet, with the reference log-probabilities that training needs.
    """
    from dice_py.data import read_pairs
    from dice_py.models.loading import resolve_model
    from dice_py.runs.inputs import pool_columns
    from dice_py.storage.keys import digest, file_digest
    from dice_py.storage.parquet import write_parquet

    if mined is not None and (not generations or not scores or prompts is None):
        raise UsageError("--mined also needs --generations, --scores and --prompts, which its row numbers refer to")
    resolved = _one_stage(
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
    settings = resolved.replay
    if settings.buffer is not None:
        raise UsageError(
            "replay.buffer is what a run keeps of its own rounds: leave it out here (--set replay.buffer=)"
        )
    if pairs is None and not settings.buffers:
        raise UsageError("nothing to replay from: give --replay FILE, --buffer NAME=FILE:SHARE, or both")
    if pairs is None and (settings.margin_power or settings.half_life is not None):
        raise UsageError(
            "--margin-power and --half-life weigh the pairs of --replay, which is not given: --set "
            "replay.buffers.NAME.margin_power=… weighs those of a buffer"
        )
    if round_number is None and any(p.half_life is not None for p in (settings, *settings.buffers.values())):
        raise UsageError("a half-life also needs --round, from which the age of a pair is counted")
    named = {} if pairs is None else {"replay": pairs}
    named |= {name: Path(found.path) for name, found in settings.buffers.items()}
    columns = pool_columns(resolved)
    frames = {
        name: read_pairs(
            file,
            prompt_column=prompt_column,
            chosen_column=chosen_column,
            rejected_column=rejected_column,
            current_round=round_number,
            **columns[name],
        )
        for name, file in named.items()
    }
    folder = resolve_model(policy, resolved.model.policy_revision, role="--policy")
    contents = {name: file_digest(file) for name, file in named.items()}
    files = {
        name: write_parquet(
            out / ("offline.parquet" if name == "replay" else f"buffer-{name}.parquet"), frame, key=contents[name]
        )
        for name, frame in frames.items()
    }
    counts = work_apart(
        "replay",
        "dice_py.stages.replay:replay",
        out,
        config=settings,
        score_config=resolved.score,
        models=resolved.model,
        policy=folder,
        mined=mined,
        generations=generations or [],
        scores=scores or [],
        prompts=prompts,
        offline=files.pop("replay", None),
        out=out,
        seed=seed,
        key=digest(
            "replay alone",
            contents,
            [file_digest(file) for file in (mined, *(generations or []), *(scores or []), prompts) if file],
            resolved.model_dump(),
            [prompt_column, chosen_column, rejected_column, round_number],
            seed,
        ),
        buffers=files,
        round_number=round_number,
    )
    print_result({"training_set": str(out / "training_set.parquet"), **counts}, as_json)


def train(
    policy: Policy,
    training_set: Annotated[Path, typer.Option(help="What `dice replay` wrote.")],
    out: Out,
    beta: Annotated[float | None, typer.Option(help="β of DPO.")] = None,
    seed: Annotated[int, typer.Option(help="The seed.")] = 0,
    config: Config = None,
    assign: Set = None,
    as_json: Json = False,
) -> None:
    """Stage 5: one DPO run, with the policy as its own reference.

    The new policy goes to OUT/model.
    """
    from dice_py.models.loading import model_identity, resolve_model
    from dice_py.storage.keys import digest, file_digest

    resolved = _one_stage(config, assign, beta=beta)
    content = file_digest(training_set)
    folder = resolve_model(policy, resolved.model.policy_revision, role="--policy")
    settings = [resolved.train.decisive(), resolved.model.model_dump(), resolved.beta, seed]
    counts = work_apart(
        "train",
        "dice_py.stages.train:train",
        out,
        config=resolved.train,
        models=resolved.model,
        policy=folder,
        training_set=training_set,
        out=out,
        beta=resolved.beta,
        seed=seed,
        key=digest("train", content, model_identity(folder), settings),
        devices=resolved.devices,
    )
    print_result({"model": str(out / "model"), **counts}, as_json)


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
    seed: Annotated[int, typer.Option(help="The seed.")] = 0,
    config: Config = None,
    assign: Set = None,
    as_json: Json = False,
) -> None:
    """Stage 6: response lengths and reward accuracy on held-out data.

    Into OUT/metrics.json.
    """
    from dice_py.data import read_pairs, read_prompts
    from dice_py.models.loading import resolve_model
    from dice_py.storage.keys import digest, file_digest
    from dice_py.storage.parquet import write_parquet
    from dice_py.storage.schemas import PROMPTS

    if prompts is None and pairs is None:
        raise UsageError("nothing to evaluate on: give --prompts, --pairs or both")
    resolved = _one_stage(config, assign)
    asked = None if prompts is None else read_prompts(prompts, prompt_column)
    held_out = (
        None
        if pairs is None
        else read_pairs(
            pairs, prompt_column=prompt_column, chosen_column=chosen_column, rejected_column=rejected_column
        )
    )
    against = resolve_model(reference, resolved.model.reference_revision, role="--reference")
    start_folder = resolve_model(start, None, role="--start")
    folder = resolve_model(policy, resolved.model.policy_revision, role="--policy")
    inputs: dict[str, Path | None] = {"prompts": None, "pairs": None}
    if asked is not None:
        key = digest(asked.to_dict(as_series=False))
        inputs["prompts"] = write_parquet(out / "eval_prompts.parquet", asked, key=key, schema=PROMPTS)
    if pairs is not None and held_out is not None:
        inputs["pairs"] = write_parquet(out / "eval_pairs.parquet", held_out, key=file_digest(pairs))
    metrics = work_apart(
        "evaluate",
        "dice_py.stages.evaluate:evaluate",
        out,
        config=resolved.evaluate,
        generate_config=resolved.generate,
        score_config=resolved.score,
        models=resolved.model,
        policy=folder,
        start=start_folder,
        reference=against,
        initial_reference=against,
        **inputs,
        out=out,
        shared=out,
        seed=seed,
        max_prompt_tokens=resolved.data.max_prompt_tokens,
        devices=resolved.devices,
        with_oracle=world_oracle,
    )
    print_result(metrics, as_json)
