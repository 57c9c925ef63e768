"""`dice audit`: how good the implicit reward of two models is as a reward model, on files of the user's or of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cli.options import Config, Json, Set, StageSeed, stage_config
from cli.output import echo_note, model_folder, models_at, print_json, prompt_settings, reading, run_job
from dice_py.errors import UsageError

if TYPE_CHECKING:
    import polars as pl

    from dice_py.config.run import RunConfig
    from dice_py.config.shared import ModelConfig
    from dice_py.evaluation.audit.reading import AuditColumns


@dataclass(frozen=True)
class _Subject:
    """What is audited, and with which settings."""

    policy: Path
    references: dict[str, Path]
    config: RunConfig
    models: ModelConfig
    rows: pl.DataFrame
    key: str
    """Of the rows' content."""
    source: Path
    """The file that they are from."""
    round_number: int | None = None


def _column(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel="Columns")


File = Annotated[Path | None, typer.Argument(metavar="FILE", help="Preference pairs, votes, or scored responses.")]
Policy = Annotated[str | None, typer.Option(help="The policy: folder, GGUF file or Hugging Face id.")]
Reference = Annotated[str | None, typer.Option(help="The model that its DPO training started from.")]
Initial = Annotated[str | None, typer.Option(help="The reference of the first round, to compare with.")]
Sft = Annotated[str | None, typer.Option(help="The SFT model, to compare with.")]
RunFolder = Annotated[Path | None, typer.Option("--run", help="A run folder: models and held-out pairs are its own.")]
Round = Annotated[
    int | None,
    typer.Option("--round", min=0, help="With --run: after which round; 0: its start; default: the last."),
]
Beta = Annotated[float | None, typer.Option(help="β of the implicit reward.")]
Alpha = Annotated[str | None, typer.Option(help="Length penalty per token: a number, or auto, what mining would find.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Where rewards and figures are kept.")]


def audit(
    file: File = None,
    policy: Policy = None,
    reference: Reference = None,
    initial: Initial = None,
    sft: Sft = None,
    folder: RunFolder = None,
    round_number: Round = None,
    beta: Beta = None,
    alpha: Alpha = None,
    out: Out = None,
    prompt_column: Annotated[str, _column("The prompt.")] = "prompt",
    chosen_column: Annotated[str, _column("The chosen response of a pair.")] = "chosen",
    rejected_column: Annotated[str, _column("The rejected response.")] = "rejected",
    response_column: Annotated[str, _column("The response of a scored row.")] = "response",
    score_column: Annotated[str | None, _column("Its score; default: score.")] = None,
    correct_column: Annotated[str | None, _column("Whether it is right; default: correct.")] = None,
    model_column: Annotated[str | None, _column("Who wrote it; default: model, if there is one.")] = None,
    chosen_model_column: Annotated[str | None, _column("Who wrote chosen; default: chosen_model.")] = None,
    rejected_model_column: Annotated[str | None, _column("Who wrote rejected; default: rejected_model.")] = None,
    source_column: Annotated[str | None, _column("Where a row is from; default: subset.")] = None,
    seed: StageSeed = 0,
    config: Config = None,
    assign: Set = None,
    as_json: Json = False,
) -> None:
    """Audit the implicit reward as a reward model.

    On pairs, votes or scored responses: accuracy and PPE's other metrics, with length alone beside them, for each
    reference and form of the reward. With --out into OUT/audit.json, and OUT/pairs.parquet or OUT/responses.parquet.
    """
    from dice_py.evaluation.audit.reading import AuditColumns

    if score_column is not None and correct_column is not None:
        raise UsageError("--score-column and --correct-column name the same thing, how good a response is: give one")
    penalty = _alpha(alpha)
    columns = AuditColumns(
        *(prompt_column, chosen_column, rejected_column, response_column, score_column, correct_column, model_column),
        *(chosen_model_column, rejected_model_column, source_column),
    )
    models = {"--policy": policy, "--reference": reference, "--initial": initial, "--sft": sft}
    if folder is not None:
        subject = _of_run(folder, round_number, file, columns, models, config, assign)
    else:
        subject = _of_models(file, round_number, columns, models, stage_config(config, assign), out)
    _run(subject, beta, penalty, out, seed, as_json)


def _run(
    subject: _Subject,
    beta: float | None,
    alpha: float | Literal["auto"] | None,
    out: Path | None,
    seed: int,
    as_json: bool,
) -> None:
    from dice_py.stages.audit import AuditJob
    from dice_py.storage.cache import cache_folder

    mining = subject.config.mine
    forms: dict[str, Literal["sum", "penalized", "per token"]] = {"linear": "penalized", "per_token": "per token"}
    job = AuditJob(
        config=subject.config.score,
        models=subject.models,
        policy=subject.policy,
        references=subject.references,
        rows=subject.rows,
        rows_key=subject.key,
        beta=subject.config.beta if beta is None else _beta(beta),
        alpha=mining.alpha if alpha is None else alpha,
        form=forms.get(mining.debias, "sum"),
        seed=seed,
        out=out,
        bad_rows=subject.config.data.bad_rows,
    )
    figures = run_job(job, cache_folder() / "log" if out is None else out).counts
    named: dict[str, Any] = {
        "file": str(subject.source),
        "round": subject.round_number,
        "policy": str(subject.policy),
        "references": {role: str(model) for role, model in subject.references.items()},
    }
    if as_json:
        print_json(named | figures)
        return
    from cli.audit_tables import print_audit

    print_audit(named | figures)


def _alpha(text: str | None) -> float | Literal["auto"] | None:
    if text is None or text == "auto":
        return text  # type: ignore[return-value]
    from math import isfinite

    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not isfinite(value) or value < 0:
        raise UsageError(f"--alpha is {text!r:.40}, but must be auto or a finite number of zero or more")
    return value


def _beta(value: float) -> float:
    from math import isfinite

    if not isfinite(value) or value <= 0:
        raise UsageError(f"--beta is {value}, but must be a finite number above zero")
    return value


def _read(file: Path, columns: AuditColumns, resolved: RunConfig) -> tuple[pl.DataFrame, str]:
    """The rows of a user's file, with what the config says of every prompt, and the key of their content."""
    from dice_py.evaluation.audit.reading import read_audit
    from dice_py.rows.sources import find_source
    from dice_py.storage.keys import digest

    source, settings = find_source(file, echo_note), prompt_settings(resolved)
    rows = settings.of_rows(read_audit(source, columns, **reading(resolved)))
    return rows, digest(source.digest(), columns.__dict__, *settings.key_fields())


def _of_models(
    file: Path | None,
    round_number: int | None,
    columns: AuditColumns,
    models: dict[str, str | None],
    resolved: RunConfig,
    out: Path | None,
) -> _Subject:
    """The file and the models that options name."""
    if file is None or models["--policy"] is None:
        raise UsageError("nothing to audit: give FILE and --policy (and --reference), or --run")
    if round_number is not None:
        raise UsageError("--round is of a run: name its folder with --run")
    rows, key = _read(file, columns, resolved)  # before the models, which may be long downloads
    revisions = {"--policy": resolved.model.policy_revision, "--reference": resolved.model.reference_revision}
    found = {
        option: model_folder(name, revisions.get(option), option) for option, name in models.items() if name is not None
    }
    policy = found.pop("--policy")
    roles = {"--reference": "previous", "--initial": "initial", "--sft": "sft"}
    references = {roles[option]: folder for option, folder in found.items()}
    return _Subject(policy, references, resolved, models_at(resolved, policy, out), rows, key, file)


def _of_run(
    folder: Path,
    number: int | None,
    file: Path | None,
    columns: AuditColumns,
    models: dict[str, str | None],
    config: list[Path] | None,
    assign: list[str] | None,
) -> _Subject:
    """What a run folder has: the models after a round, and the held-out pairs unless a file is given."""
    from dice_py.config.loading import reassigned
    from dice_py.runs.audited import audited_round
    from dice_py.storage.parquet import parquet_key, read_parquet

    given = [option for option, name in models.items() if name is not None]
    if given or config:
        raise UsageError(f"{(given or ['--config'])[0]} is the run's own with --run: leave out one of the two")
    found = audited_round(folder, number)
    resolved = reassigned(found.config, assign or [])
    if file is None and found.pairs is None:
        raise UsageError(f"--run: {folder} has no held-out pairs: give a FILE to audit its models on")
    if file is not None:
        rows, key = _read(file, columns, resolved)
        source = file
    else:
        assert found.pairs is not None
        rows, key, source = read_parquet(found.pairs), str(parquet_key(found.pairs)), found.pairs
    return _Subject(found.policy, found.references, resolved, resolved.model, rows, key, source, found.number)
