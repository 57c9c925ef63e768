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
    from dice_py.config import resolve

    return resolve(config or [], assign or [], overrides(**options), one_stage=True)


def work_apart(stage: str, work: str, folder: Path, **arguments: Any) -> Any:
    """Runs a stage in a process of its own, whose log goes to `folder`, and shows how far it is."""
    from cli.display import Display
    from dice_py.rounds import REMEDIES
    from dice_py.worker import run_stage

    with Display() as display:
        display("stage", stage=stage, status="running")
        return run_stage(work, arguments, log=folder / "worker.log", remedy=REMEDIES[stage], report=display)


def print_result(value: dict[str, Any], as_json: bool) -> None:
    """What a stage has made: one JSON object, or a line for each name."""
    if as_json:
        print_json(value)
        return
    from dice_py.report import number

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
    from dice_py.artefacts import PROMPTS, digest, write_parquet
    from dice_py.data import read_prompts
    from dice_py.models import resolve_model

    resolved = _one_stage(config, assign, generate__samples=samples, generate__engine=engine)
    frame = read_prompts(prompts, prompt_column)  # before the model, which may be a long download
    folder = resolve_model(policy, resolved.model.policy_revision, role="--policy")
    write_parquet(out / "prompts.parquet", frame, key=digest(frame.to_dict(as_series=False)), schema=PROMPTS)
    made = work_apart(
        "generate",
        "dice_py.generate:generate",
        out,
        config=resolved.generate,
        models=resolved.model,
        policy=folder,
        prompts=out / "prompts.parquet",
        out=out,
        seed=seed,
        round_number=1,
        max_prompt_tokens=resolved.data.max_prompt_tokens,
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
    from dice_py.artefacts import digest, file_digest
    from dice_py.models import model_identity, resolve_model

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
    files = work_apart(
        "score",
        "dice_py.score:score",
        out,
        config=resolved.score,
        models=resolved.model,
        **folders,
        generations=generations,
        out=out,
        keys=[digest("score", content, models, settings) for content in contents],
        beta=resolved.beta,
        prompt_column=prompt_tokens_column,
        response_column=tokens_column,
    )
    print_result({"files": [str(file) for file in files]}, as_json)


def mine(
    scored: Annotated[Path, typer.Argument(help="Parquet with one row per response.")],
    out: Out,
    prompt_column: Annotated[str, typer.Option(help="Column that names the prompt.")] = "prompt_id",
    reward_column: Annotated[str, typer.Option(help="Column of rewards.")] = "reward",
    length_column: Annotated[str, typer.Option(help="Column of lengths.")] = "response_tokens",
    debias: Annotated[str, typer.Option(help="none, linear or bucket.")] = "linear",
    alpha: Annotated[str, typer.Option(help="The length penalty: auto, or a number ≥ 0.")] = "auto",
    min_responses: Annotated[int, typer.Option(help="Usable responses that a prompt needs.")] = 2,
    min_length: Annotated[int | None, typer.Option(help="Shortest response to use.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest response to use.")] = None,
    buckets: Annotated[int, typer.Option(help="Length quantiles of --debias bucket.")] = 10,
    bucket_scale: Annotated[bool, typer.Option(help="Scale inside buckets too.")] = False,
    as_json: Json = False,
) -> None:
    """Stage 3: pairs of chosen and rejected, less the length bias.

    Written to OUT (Parquet) with the row numbers of both responses in SCORED.
    """
    from dice_py.mine import mine_file

    try:
        penalty: Any = "auto" if alpha == "auto" else float(alpha)
    except ValueError:
        raise UsageError(f"--alpha is {alpha!r}, but must be 'auto' or a finite number of zero or more") from None
    summary = mine_file(
        scored,
        out,
        prompt_column=prompt_column,
        reward_column=reward_column,
        length_column=length_column,
        debias=debias,
        alpha=penalty,
        min_responses=min_responses,
        min_length=min_length,
        max_length=max_length,
        buckets=buckets,
        bucket_scale=bucket_scale,
    )
    print_result(summary, as_json)


def replay(
    policy: Policy,
    out: Out,
    pairs: Annotated[Path, typer.Option("--replay", help="Offline pairs in TRL's format.")],
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
    weight_column: Annotated[str | None, typer.Option(help="Weights of the draw.")] = None,
    seed: Annotated[int, typer.Option(help="The seed.")] = 0,
    config: Config = None,
    assign: Set = None,
    as_json: Json = False,
) -> None:
    """Stage 4: mix the share γ of offline pairs into the mined ones.

    Into OUT/training_set.parquet, with the reference log-probabilities that training needs.
    """
    from dice_py.artefacts import digest, file_digest, write_parquet
    from dice_py.data import read_pairs
    from dice_py.models import resolve_model

    if mined is not None and (not generations or not scores or prompts is None):
        raise UsageError("--mined also needs --generations, --scores and --prompts, which its row numbers refer to")
    resolved = _one_stage(config, assign, replay__gamma=gamma)
    offline = read_pairs(
        pairs,
        prompt_column=prompt_column,
        chosen_column=chosen_column,
        rejected_column=rejected_column,
        weight_column=weight_column,
    )
    folder = resolve_model(policy, resolved.model.policy_revision, role="--policy")
    content = file_digest(pairs)
    write_parquet(out / "offline.parquet", offline, key=content)
    counts = work_apart(
        "replay",
        "dice_py.replay:replay",
        out,
        config=resolved.replay,
        score_config=resolved.score,
        models=resolved.model,
        policy=folder,
        mined=mined,
        generations=generations or [],
        scores=scores or [],
        prompts=prompts,
        offline=out / "offline.parquet",
        out=out,
        seed=seed,
        key=digest(
            "replay alone",
            content,
            [file_digest(file) for file in (mined, *(generations or []), *(scores or []), prompts) if file],
            resolved.model_dump(),
            seed,
        ),
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
    from dice_py.artefacts import digest, file_digest
    from dice_py.models import model_identity, resolve_model

    resolved = _one_stage(config, assign, beta=beta)
    content = file_digest(training_set)
    folder = resolve_model(policy, resolved.model.policy_revision, role="--policy")
    settings = [resolved.train.model_dump(), resolved.model.model_dump(), resolved.beta, seed]
    counts = work_apart(
        "train",
        "dice_py.train:train",
        out,
        config=resolved.train,
        models=resolved.model,
        policy=folder,
        training_set=training_set,
        out=out,
        beta=resolved.beta,
        seed=seed,
        key=digest("train", content, model_identity(folder), settings),
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
    from dice_py.artefacts import PROMPTS, digest, file_digest, write_parquet
    from dice_py.data import read_pairs, read_prompts
    from dice_py.models import resolve_model

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
        "dice_py.evaluate:evaluate",
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
        with_oracle=world_oracle,
    )
    print_result(metrics, as_json)
