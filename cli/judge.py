"""`dice judge`: compares two models' responses to the same prompts by an oracle, a reward model, or another judge."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import Config, Json, Panels, Set, StageSeed, stage_config
from cli.output import model_folder, print_result, prompt_settings, reading, run_job
from dice_py.errors import DataError, UsageError

if TYPE_CHECKING:
    from dice_py.config.run import RunConfig
    from dice_py.evaluation.judges.base import Judge
    from dice_py.evaluation.response_sets import Matched

Ours = Annotated[Path, typer.Argument(metavar="OURS", help="Responses of the model that is judged.")]
Theirs = Annotated[Path, typer.Argument(metavar="THEIRS", help="Responses of the model that it is compared with.")]
Annotations = Annotated[
    Path | None, typer.Option("--out", "-o", help="The verdicts, as AlpacaEval's annotations.json.")
]
OursName = Annotated[str | None, typer.Option(help="OURS in the annotations; default: the file's generator, or name.")]
TheirsName = Annotated[str | None, typer.Option(help="THEIRS in the annotations.")]
PromptColumn = Annotated[str, typer.Option(help="The prompts' column.")]
ResponseColumn = Annotated[str, typer.Option(help="The responses' column.")]


class JudgeCommand(Panels):
    """A judge: its inputs are files or folders of generations, and its result is one file."""

    out_is_file = True
    may_be_folders = ("ours", "theirs")


judge_app = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Compare two models' responses, pair by pair, by a judge. OURS and THEIRS are files with a prompt and a "
    "response in each row (AlpacaEval's model_outputs.json too), or folders of `dice generate`.",
)


@judge_app.command(cls=JudgeCommand)
def oracle(
    ours: Ours,
    theirs: Theirs,
    out: Annotations = None,
    ours_name: OursName = None,
    theirs_name: TheirsName = None,
    prompt_column: PromptColumn = "prompt",
    response_column: ResponseColumn = "response",
    seed: StageSeed = 0,
    config: Config = None,
    assign: Set = None,
    as_json: Json = False,
) -> None:
    """The oracle of the synthetic world, on its prompts."""
    from dice_py.evaluation.judges.oracle import OracleJudge
    from dice_py.synthetic.task import is_prompt

    resolved = stage_config(config, assign)
    matched, names = _matched(resolved, ours, theirs, (ours_name, theirs_name), prompt_column, response_column, out)
    for messages in matched.prompts["messages"].to_list():
        if not is_prompt(messages):
            raise DataError(
                f"{ours}: the prompt {messages[-1]['content']!r:.80} is not of the synthetic world, and its oracle "
                "judges no other; use another judge"
            )
    _run(OracleJudge(), matched, names, out, seed, as_json)


@judge_app.command("reward-model", cls=JudgeCommand)
def reward_model(
    ours: Ours,
    theirs: Theirs,
    out: Annotations = None,
    model: Annotated[
        str | None, typer.Option(help="A sequence classifier with one label: a folder or a Hugging Face id.")
    ] = None,
    ours_name: OursName = None,
    theirs_name: TheirsName = None,
    prompt_column: PromptColumn = "prompt",
    response_column: ResponseColumn = "response",
    seed: StageSeed = 0,
    config: Config = None,
    assign: Set = None,
    as_json: Json = False,
) -> None:
    """A reward model of transformers: the response with the higher score wins."""
    resolved = _config(config, assign, "reward_model", {"model": model}, "--model")
    matched, names = _matched(resolved, ours, theirs, (ours_name, theirs_name), prompt_column, response_column, out)
    _run(_judge(resolved, "reward_model"), matched, names, out, seed, as_json)


@judge_app.command(cls=JudgeCommand)
def implicit(
    ours: Ours,
    theirs: Theirs,
    out: Annotations = None,
    policy: Annotated[str | None, typer.Option(help="π, a DPO-tuned model: folder, GGUF file or id.")] = None,
    reference: Annotated[str | None, typer.Option(help="π_ref, the model that its training started from.")] = None,
    per_token: Annotated[
        bool | None, typer.Option("--per-token", help="Divide rewards by the response's tokens.")
    ] = None,
    ours_name: OursName = None,
    theirs_name: TheirsName = None,
    prompt_column: PromptColumn = "prompt",
    response_column: ResponseColumn = "response",
    seed: StageSeed = 0,
    config: Config = None,
    assign: Set = None,
    as_json: Json = False,
) -> None:
    """The implicit reward of a DPO pair of models: the response with the higher reward wins."""
    given = {"policy": policy, "reference": reference, "per_token": per_token}
    resolved = _config(config, assign, "implicit", given, "--policy and --reference")
    matched, names = _matched(resolved, ours, theirs, (ours_name, theirs_name), prompt_column, response_column, out)
    _run(_judge(_converted(resolved), "implicit"), matched, names, out, seed, as_json)


@judge_app.command(cls=JudgeCommand)
def openai(
    ours: Ours,
    theirs: Theirs,
    out: Annotations = None,
    base_url: Annotated[str | None, typer.Option(help="The server, such as http://127.0.0.1:8000/v1.")] = None,
    model: Annotated[str | None, typer.Option(help="The model's name at the server.")] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable with the key.  [default: OPENAI_API_KEY]")
    ] = None,
    template: Annotated[Path | None, typer.Option(help="The judge's prompt, a Jinja template.")] = None,
    verdict: Annotated[str | None, typer.Option(help="text or logprobs (of A and B as the first token).")] = None,
    both_orders: Annotated[
        bool | None, typer.Option("--both-orders/--one-order", help="Ask twice, with the responses exchanged.")
    ] = None,
    concurrency: Annotated[int | None, typer.Option(help="Requests at one time.")] = None,
    budget_tokens: Annotated[int | None, typer.Option(help="Stop before it uses more tokens.")] = None,
    budget_cost: Annotated[float | None, typer.Option(help="Stop before it costs more.")] = None,
    input_price: Annotated[float | None, typer.Option(help="Price of a million input tokens.")] = None,
    output_price: Annotated[float | None, typer.Option(help="Price of a million output tokens.")] = None,
    ours_name: OursName = None,
    theirs_name: TheirsName = None,
    prompt_column: PromptColumn = "prompt",
    response_column: ResponseColumn = "response",
    seed: StageSeed = 0,
    config: Config = None,
    assign: Set = None,
    as_json: Json = False,
) -> None:
    """A model behind a server with OpenAI's chat completions.

    Further settings: --set evaluate.judges.openai.KEY=VALUE. Answers are kept: a repeated call asks for the rest.
    """
    given = {
        "base_url": base_url,
        "model": model,
        "api_key_env": api_key_env,
        "template": None if template is None else str(template),
        "verdict": verdict,
        "both_orders": both_orders,
        "concurrency": concurrency,
        "budget_tokens": budget_tokens,
        "budget_cost": budget_cost,
        "input_price": input_price,
        "output_price": output_price,
    }
    resolved = _config(config, assign, "openai", given, "--base-url and --model")
    matched, names = _matched(resolved, ours, theirs, (ours_name, theirs_name), prompt_column, response_column, out)
    _run(_judge(resolved, "openai"), matched, names, out, seed, as_json)


@judge_app.command(cls=JudgeCommand)
def function(
    ours: Ours,
    theirs: Theirs,
    out: Annotations = None,
    call: Annotated[str | None, typer.Option(help="The function, as package.module:name.")] = None,
    ours_name: OursName = None,
    theirs_name: TheirsName = None,
    prompt_column: PromptColumn = "prompt",
    response_column: ResponseColumn = "response",
    seed: StageSeed = 0,
    config: Config = None,
    assign: Set = None,
    as_json: Json = False,
) -> None:
    """A function of yours, (prompt, response) -> number: the response with the higher number wins."""
    resolved = _config(config, assign, "function", {"call": call}, "--call")
    matched, names = _matched(resolved, ours, theirs, (ours_name, theirs_name), prompt_column, response_column, out)
    _run(_judge(resolved, "function"), matched, names, out, seed, as_json)


def _config(
    config: list[Path] | None, assign: list[str] | None, name: str, given: dict[str, Any], options: str
) -> RunConfig:
    """The config with the judge's section, from options, files and --set."""
    section = {key: value for key, value in given.items() if value is not None}
    resolved = stage_config(config, assign, evaluate__judges={name: section} if section else None)
    if getattr(resolved.evaluate.judges, name) is None:
        raise UsageError(f"this judge needs {options}")
    return resolved


def _judge(resolved: RunConfig, name: str) -> Judge:
    from dice_py.evaluation.judges.registry import JUDGES

    return JUDGES[name](getattr(resolved.evaluate.judges, name), resolved.model)


def _converted(resolved: RunConfig) -> RunConfig:
    """The config with the folders of the implicit judge's models, converted in a process of their own."""
    judges = resolved.evaluate.judges
    section = judges.implicit
    assert section is not None
    update: dict[str, Any] = {"policy_revision": None, "reference_revision": None}
    for role in ("policy", "reference"):
        revision = getattr(section, f"{role}_revision")
        update[role] = str(model_folder(getattr(section, role), revision, f"--{role}"))
    judges = judges.model_copy(update={"implicit": section.model_copy(update=update)})
    return resolved.model_copy(update={"evaluate": resolved.evaluate.model_copy(update={"judges": judges})})


def _matched(
    resolved: RunConfig,
    ours: Path,
    theirs: Path,
    names: tuple[str | None, str | None],
    prompt_column: str,
    response_column: str,
    out: Path | None,
) -> tuple[Matched, tuple[str, str]]:
    """The pairs of responses, and the names of both sides."""
    from dice_py.evaluation.response_sets import match, read_response_set

    for side in (ours, theirs):
        if out is not None and os.path.realpath(side) == os.path.realpath(out):
            raise UsageError(f"--out is {out}, which holds the responses and would be replaced: give another file")
    columns = {"prompt_column": prompt_column, "response_column": response_column}
    settings = prompt_settings(resolved)
    sets = [
        read_response_set(path, option, name, settings=settings, **columns, **reading(resolved))
        for path, option, name in ((ours, "OURS", names[0]), (theirs, "THEIRS", names[1]))
    ]
    return match(sets[0], sets[1]), (sets[0].name, sets[1].name)


def _run(judge: Judge, matched: Matched, names: tuple[str, str], out: Path | None, seed: int, as_json: bool) -> None:
    from dice_py.stages.judge import JudgeJob
    from dice_py.storage.cache import cache_folder

    job = JudgeJob(judge=judge, matched=matched, names=names, out=out, seed=seed)
    result = run_job(job, cache_folder() / "log")
    written = {} if out is None else {"annotations": str(out)}
    print_result({**result.counts, **written}, as_json)
