"""How commands print results and run jobs: results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.terminal import say

if TYPE_CHECKING:
    import polars as pl

    from dice_py.config.prompt_settings import PromptSettings
    from dice_py.config.rounds import WarningsConfig
    from dice_py.config.run import RunConfig
    from dice_py.config.shared import ModelConfig
    from dice_py.events import Report
    from dice_py.rows.sources import Source
    from dice_py.runs.warnings import StageWarning
    from dice_py.stages.job import Job, StageResult


def pages(report: Report) -> Callable[[Path], None]:
    """What a run writes for people to read: its report, and the cards of what its rounds have made."""
    from dice_py.reporting.cards.write import write_cards
    from dice_py.reporting.html import write_report

    def write(folder: Path) -> None:
        write_report(folder)
        write_cards(folder, report)

    return write


def print_json(value: Any) -> None:
    """One JSON object on one line of stdout."""
    say(json.dumps(value, allow_nan=False).replace("\x7f", "\\u007f"))  # the one control that json.dumps writes raw


def print_result(value: dict[str, Any], as_json: bool) -> None:
    """The result of a stage: one JSON object, or a line for each name."""
    if as_json:
        print_json(value)
        return
    from dice_py.reporting.formatting import number

    for name, item in value.items():
        text = "".join(f"\n  {file}" for file in item) if name == "files" else number(item)
        say(f"{name.replace('_', ' ')}: {text}")


def run_job(job: Job, folder: Path, limits: WarningsConfig | None = None) -> StageResult:
    """Runs a job in a process of its own, which logs to `folder/worker.log`, and shows its progress.

    Args:
        limits: above which the result is warned of; None: no warnings.
    """
    from cli.progress import Display
    from dice_py.compute.stage_process import run_in_subprocess
    from dice_py.config.rounds import GRACE_SECONDS
    from dice_py.stages.registry import stage_of
    from dice_py.storage.files import remove_leftovers

    for written in (folder, folder / "samples", folder / "start", folder / "previous"):
        remove_leftovers(written)
    stage = stage_of(job)
    with Display() as display:
        display("stage", stage=stage.name, status="running")
        result: StageResult = run_in_subprocess(
            job.run,
            log=folder / "worker.log",
            remedy=stage.remedy,
            report=display,
            grace=GRACE_SECONDS if stage.stops_when_asked else None,
        )
    if limits is not None:
        from dice_py.runs.warnings import stage_warnings

        echo_warnings(stage_warnings(stage.name, job, result, limits))
    return result


def echo_warnings(warnings: list[StageWarning]) -> None:
    """Prints warnings to stderr."""
    for warning in warnings:
        say(f"warning: {warning.text}", err=True)


def model_folder(name: str, revision: str | None, role: str) -> Path:
    """The local folder of a model that an option names. What has to be converted is so in a process of its own.

    Args:
        role: the option, for error messages.
    """
    from dice_py.models.sources import needs_conversion, resolve_model
    from dice_py.stages.convert import ConvertJob
    from dice_py.storage.cache import cache_folder

    if needs_conversion(name, revision, role):
        return run_job(ConvertJob(name, revision, role), cache_folder() / "log").files[0][0]
    return resolve_model(name, revision, role=role, report=echo_note)


def write_copy(path: Path, frame: pl.DataFrame, *, key: str, schema: pl.Schema | None = None) -> Path:
    """Writes the rows of a user's file as an artifact into --out, and returns its path.

    A file of that name which is none of this program's is set aside, and not overwritten.
    """
    from dice_py.storage.integrity import is_kept
    from dice_py.storage.parquet import write_parquet

    is_kept(path, key, echo_note)
    return write_parquet(path, frame, key=key, schema=schema)


def echo_note(event: str, **fields: Any) -> None:
    """A `Report` that prints notes to stderr."""
    if event == "note":
        say(fields["text"], err=True)


def reading(resolved: RunConfig) -> dict[str, Any]:
    """How the rows of a user's file are read, as keywords of `read_prompts` and `read_pairs`."""
    return {"rule": resolved.data.bad_rows, "ignored": resolved.data.ignored_keys, "report": echo_note}


def prompt_settings(resolved: RunConfig) -> PromptSettings:
    """What the config says of every prompt, to complete what was read."""
    from dice_py.config.prompt_settings import PromptSettings

    return PromptSettings.of(resolved)


def pairs_key(resolved: RunConfig, source: Source) -> str:
    """A key of a source of pairs by content, with what the config says of every prompt."""
    from dice_py.storage.keys import digest

    said = prompt_settings(resolved).key_fields()
    return digest(source.digest(), said) if said else source.digest()


def models_at(resolved: RunConfig, policy: Path, out: Path | None) -> ModelConfig:
    """The models' config, with the time that the policy's chat template prints, if it prints one.

    Args:
        out: the folder that keeps the time for the next call; None: it is now.
    """
    from dice_py.models.template_time import FILE, prints_time, with_template_time

    if out is not None:
        return with_template_time(resolved.model, policy, out / FILE, echo_note)
    from datetime import datetime

    if resolved.model.template_time is not None or not prints_time(resolved.model, policy):
        return resolved.model
    return resolved.model.model_copy(update={"template_time": datetime.now().isoformat(timespec="seconds")})
