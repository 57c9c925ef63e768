"""`dice`: the loop, each of its stages alone, and what there is to see of them.

Heavy modules are imported inside the commands, so that `dice --help` answers at once. Results go to stdout
(one JSON object with --json), everything else to stderr. Exit codes: 0 done, 2 usage or config, 3 bad input
data, 4 out of memory, 5 interrupted and resumable, 1 a bug of ours.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dice_py.errors import DiceError, InterruptedRunError, UsageError

app = typer.Typer(
    name="dice",
    help="Self-alignment of language models with DPO implicit rewards (DICE).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Config = Annotated[list[Path] | None, typer.Option("--config", "-c", help="YAML file; several are merged in order.")]
Set = Annotated[list[str] | None, typer.Option("--set", "-s", help="One config value: section.key=value.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else, on stdout.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Where the result goes.")]
Policy = Annotated[str, typer.Option(help="The policy: a model folder or a Hugging Face id.")]
Reference = Annotated[str, typer.Option(help="The model that the policy's DPO training started from.")]
RunFolder = Annotated[Path, typer.Argument(help="A run folder.")]
DEFAULT_RUNS = Path("runs")


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, allow_nan=False))


def _overrides(**values: Any) -> dict[str, Any]:
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


@app.command()
def run(
    config: Config = None,
    assign: Set = None,
    policy: Annotated[str | None, typer.Option(help="π_1, a DPO-tuned model: folder or Hugging Face id.")] = None,
    reference: Annotated[str | None, typer.Option(help="The model that its DPO training started from.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts: JSONL, JSON or Parquet.")] = None,
    replay: Annotated[Path | None, typer.Option(help="Offline pairs in TRL's format.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds of generate, score, mine, replay, train.")] = None,
    seed: Annotated[int | None, typer.Option(help="The run's seed.")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="The run folder; default: a new one under runs/.")] = None,
    as_json: Json = False,
) -> None:
    """Run the loop. With no model named: on a small synthetic world, made on first use."""
    from cli.display import Display, print_metrics
    from dice_py.config import resolve
    from dice_py.rounds import new_run_folder
    from dice_py.rounds import run as run_rounds

    resolved = resolve(
        config or [],
        assign or [],
        _overrides(
            model__policy=policy,
            model__reference=reference,
            data__prompts=None if prompts is None else str(prompts),
            data__replay=None if replay is None else str(replay),
            rounds=rounds,
            seed=seed,
        ),
    )
    folder = run_dir or new_run_folder(DEFAULT_RUNS)
    with Display() as display:
        display.console.print(f"run folder: {folder}", soft_wrap=True, highlight=False)
        metrics = run_rounds(resolved, folder, display)
    _finish(folder, metrics, as_json, print_metrics)


@app.command()
def resume(folder: RunFolder, as_json: Json = False) -> None:
    """Go on with a run: redo nothing that is whole, reuse nothing whose inputs changed."""
    from cli.display import Display, print_metrics
    from dice_py.rounds import resume as resume_rounds

    with Display() as display:
        metrics = resume_rounds(folder, display)
    _finish(folder, metrics, as_json, print_metrics)


def _finish(folder: Path, metrics: dict[str, Any], as_json: bool, print_metrics: Any) -> None:
    if as_json:
        _print_json({"run": str(folder), "metrics": metrics})
        return
    from rich.console import Console

    print_metrics(metrics, Console())
    last = max(metrics)
    typer.echo(f"new policy: {folder / last / 'train' / 'model'}\nreport:     {folder / 'report.html'}")


@app.command()
def status(
    folder: Annotated[Path | None, typer.Argument(help="A run folder; default: all runs under runs/.")] = None,
    as_json: Json = False,
) -> None:
    """Show the stages of a run, with their counts and times."""
    from rich.console import Console
    from rich.table import Table

    from dice_py.report import number, seconds
    from dice_py.status import list_runs, run_status

    if folder is None:
        runs = list_runs(DEFAULT_RUNS)
        if as_json:
            _print_json(runs)
            return
        if not runs:
            typer.echo(f"no runs under {DEFAULT_RUNS}/")
        for found in runs:
            typer.echo(f"{found['run']}  {found['state']}  {found['done']}/{found['stages']} stages")
        return
    found = run_status(folder)
    if as_json:
        _print_json(found)
        return
    table = Table(
        title=f"{found['run']}: {found['state']}, {found['done']} of {found['stages']} stages",
        title_justify="left", box=None, pad_edge=False,
    )  # fmt: skip
    for name, justify in (("stage", "left"), ("status", "left"), ("time", "right"), ("counts", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for entry in found["entries"]:
        told = ", ".join(
            f"{key.replace('_', ' ')} {number(value)}"
            for key, value in entry["counts"].items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        )
        table.add_row(entry["stage"], entry["status"], seconds(entry["seconds"]), told)
    Console().print(table)


@app.command()
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
    """Stage 1: sample K responses per prompt into OUT/generations-NNNNN.parquet."""
    from dice_py.artefacts import PROMPTS, digest, write_parquet
    from dice_py.data import read_prompts
    from dice_py.models import resolve_model

    resolved = _one_stage(config, assign, generate__samples=samples, generate__engine=engine)
    folder = resolve_model(policy, resolved.model.policy_revision, role="--policy")
    frame = read_prompts(prompts, prompt_column)
    write_parquet(out / "prompts.parquet", frame, key=digest(frame.to_dict(as_series=False)), schema=PROMPTS)
    made = _work(
        "generate", "dice_py.generate:generate", out,
        config=resolved.generate, models=resolved.model, policy=folder, prompts=out / "prompts.parquet", out=out,
        seed=seed, round_number=1, max_prompt_tokens=resolved.data.max_prompt_tokens,
    )  # fmt: skip
    _result({"files": [str(file) for file in made.files], **made.counts()}, as_json)


@app.command()
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
    """Stage 2: implicit rewards β·(log π − log π_ref) of stored tokens, into OUT/scores-NNNNN.parquet."""
    from dice_py.artefacts import digest, file_digest
    from dice_py.models import model_identity, resolve_model

    resolved = _one_stage(config, assign, beta=beta)
    folders = {
        "policy": resolve_model(policy, resolved.model.policy_revision, role="--policy"),
        "reference": resolve_model(reference, resolved.model.reference_revision, role="--reference"),
    }
    settings = [resolved.score.model_dump(), resolved.model.model_dump(), resolved.beta, prompt_tokens_column, tokens_column]
    models = [model_identity(folder) for folder in folders.values()]
    files = _work(
        "score", "dice_py.score:score", out,
        config=resolved.score, models=resolved.model, **folders, generations=generations, out=out,
        keys=[digest("score", file_digest(file), models, settings) for file in generations], beta=resolved.beta,
        prompt_column=prompt_tokens_column, response_column=tokens_column,
    )  # fmt: skip
    _result({"files": [str(file) for file in files]}, as_json)


@app.command()
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
    """Stage 3: pairs (chosen, rejected) with the length bias taken out, as row numbers, into OUT."""
    from dice_py.mine import mine_file

    try:
        penalty: Any = "auto" if alpha == "auto" else float(alpha)
    except ValueError:
        raise UsageError(f"--alpha is {alpha!r}, but must be 'auto' or a finite number of zero or more") from None
    summary = mine_file(
        scored, out,
        prompt_column=prompt_column, reward_column=reward_column, length_column=length_column, debias=debias,
        alpha=penalty, min_responses=min_responses, min_length=min_length, max_length=max_length, buckets=buckets,
        bucket_scale=bucket_scale,
    )  # fmt: skip
    _result(summary, as_json)


@app.command()
def replay(
    policy: Policy,
    out: Out,
    pairs: Annotated[Path, typer.Option("--replay", help="Offline pairs in TRL's format.")],
    mined: Annotated[Path | None, typer.Option(help="Mined pairs; none: a training set of offline pairs alone.")] = None,
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
    """Stage 4: mix the share γ of offline pairs into the mined ones: OUT/training_set.parquet."""
    from dice_py.artefacts import digest, write_parquet
    from dice_py.data import read_pairs
    from dice_py.models import resolve_model

    if mined is not None and (not generations or not scores or prompts is None):
        raise UsageError("--mined also needs --generations, --scores and --prompts, which its row numbers refer to")
    resolved = _one_stage(config, assign, replay__gamma=gamma)
    folder = resolve_model(policy, resolved.model.policy_revision, role="--policy")
    offline = read_pairs(
        pairs, prompt_column=prompt_column, chosen_column=chosen_column, rejected_column=rejected_column,
        weight_column=weight_column,
    )  # fmt: skip
    write_parquet(out / "offline.parquet", offline, key=digest(str(pairs)))
    counts = _work(
        "replay", "dice_py.replay:replay", out,
        config=resolved.replay, score_config=resolved.score, models=resolved.model, policy=folder, mined=mined,
        generations=generations or [], scores=scores or [], prompts=prompts, offline=out / "offline.parquet", out=out,
        seed=seed, key=digest("replay alone", resolved.model_dump(), seed),
    )  # fmt: skip
    _result({"training_set": str(out / "training_set.parquet"), **counts}, as_json)


@app.command()
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
    """Stage 5: one DPO run from the policy, with itself as the reference: OUT/model."""
    from dice_py.artefacts import digest, file_digest
    from dice_py.models import model_identity, resolve_model

    resolved = _one_stage(config, assign, beta=beta)
    folder = resolve_model(policy, resolved.model.policy_revision, role="--policy")
    settings = [resolved.train.model_dump(), resolved.model.model_dump(), resolved.beta, seed]
    counts = _work(
        "train", "dice_py.train:train", out,
        config=resolved.train, models=resolved.model, policy=folder, training_set=training_set, out=out,
        beta=resolved.beta, seed=seed,
        key=digest("train", file_digest(training_set), model_identity(folder), settings),
    )  # fmt: skip
    _result({"model": str(out / "model"), **counts}, as_json)


@app.command()
def evaluate(
    policy: Policy,
    start: Annotated[str, typer.Option(help="The policy to compare with.")],
    reference: Reference,
    out: Out,
    prompts: Annotated[Path | None, typer.Option(help="Held-out prompts.")] = None,
    pairs: Annotated[Path | None, typer.Option(help="Held-out pairs in TRL's format.")] = None,
    prompt_column: Annotated[str, typer.Option(help="The prompts' column.")] = "prompt",
    world_oracle: Annotated[bool, typer.Option("--oracle", help="The prompts are the synthetic world's.")] = False,
    seed: Annotated[int, typer.Option(help="The seed.")] = 0,
    config: Config = None,
    assign: Set = None,
    as_json: Json = False,
) -> None:
    """Stage 6: lengths, and the implicit reward's accuracy, on held-out data: OUT/metrics.json."""
    from dice_py.artefacts import PROMPTS, digest, write_parquet
    from dice_py.data import read_pairs, read_prompts
    from dice_py.models import resolve_model

    if prompts is None and pairs is None:
        raise UsageError("nothing to evaluate on: give --prompts, --pairs or both")
    resolved = _one_stage(config, assign)
    inputs: dict[str, Path | None] = {"prompts": None, "pairs": None}
    if prompts is not None:
        inputs["prompts"] = write_parquet(
            out / "eval_prompts.parquet", read_prompts(prompts, prompt_column), key=digest(str(prompts)), schema=PROMPTS
        )
    if pairs is not None:
        inputs["pairs"] = write_parquet(
            out / "eval_pairs.parquet", read_pairs(pairs, prompt_column=prompt_column), key=digest(str(pairs))
        )
    against = resolve_model(reference, resolved.model.reference_revision, role="--reference")
    metrics = _work(
        "evaluate", "dice_py.evaluate:evaluate", out,
        config=resolved.evaluate, generate_config=resolved.generate, score_config=resolved.score,
        models=resolved.model, policy=resolve_model(policy, resolved.model.policy_revision, role="--policy"),
        start=resolve_model(start, None, role="--start"), reference=against, initial_reference=against, **inputs,
        out=out, shared=out, seed=seed, max_prompt_tokens=resolved.data.max_prompt_tokens, with_oracle=world_oracle,
    )  # fmt: skip
    _result(metrics, as_json)


@app.command()
def world(config: Config = None, assign: Set = None, as_json: Json = False) -> None:
    """Make the synthetic world (or find it in the cache) and show what is in it."""
    from dice_py.config import resolve
    from dice_py.world import World, cache_folder, find_world

    resolved = resolve(config or [], assign or []).world
    found = find_world(resolved)
    if found is None:
        found = World(Path(_work("world", "dice_py.world:make_world", cache_folder() / "log", config=resolved)))
    _result({"folder": str(found.folder), **found.info()}, as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show what is installed, which devices there are, which engine `auto` picks, and what is missing."""
    from dice_py.doctor import examine

    found = examine()
    if as_json:
        _print_json(found)
        return
    for name, version in found["packages"].items():
        typer.echo(f"{name:<14}{version or 'not installed'}")
    typer.echo(f"{'python':<14}{found['python']}")
    typer.echo(f"{'devices':<14}{', '.join(found['devices'])}")
    typer.echo(f"{'engine':<14}{found['engine'] or 'none'} ({found['engine_reason']})")
    typer.echo(f"{'cache':<14}{found['cache']}")
    for missing in found["missing"]:
        typer.echo(f"missing: {missing['what']}; add it with: {missing['command']}")
    if not found["missing"]:
        typer.echo("nothing is missing")


def _one_stage(config: list[Path] | None, assign: list[str] | None, **options: Any) -> Any:
    from dice_py.config import resolve

    return resolve(config or [], assign or [], _overrides(**options), one_stage=True)


def _work(stage: str, work: str, folder: Path, **arguments: Any) -> Any:
    from cli.display import Display
    from dice_py.rounds import REMEDIES
    from dice_py.worker import run_stage

    with Display() as display:
        return run_stage(work, arguments, log=folder / "worker.log", remedy=REMEDIES[stage], report=display)


def _result(value: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(value)
        return
    from dice_py.report import number

    for name, item in value.items():
        shown = "\n".join(item) if name == "files" else number(item)
        typer.echo(f"{name.replace('_', ' ')}: {shown}")


def main() -> None:
    """The console script: runs the application and turns errors into sentences and exit codes."""
    try:
        app()
    except DiceError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("error: interrupted", err=True)
        sys.exit(InterruptedRunError.exit_code)


if __name__ == "__main__":
    main()
