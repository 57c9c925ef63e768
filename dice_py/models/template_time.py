"""The time that a chat template prints: fixed when the run, or a stage's output folder, is made, and stored there.

A template that prints today's date (`strftime_now`, as Llama 3's does) would render other prompts each day, so that no
key would hold.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from dice_py.config.shared import ModelConfig
from dice_py.errors import UsageError
from dice_py.events import Report, no_report
from dice_py.models.own_template import template_source
from dice_py.storage.files import read_sealed, write_sealed

FILE = "rendered-at.json"
"""Its name in `inputs/` of a run, or in a stage's output folder."""

_KEY = "template time"


def prints_time(models: ModelConfig, folder: Path) -> bool:
    """True if model.chat_template, or else a chat template of a model folder, asks for the time."""
    source = template_source(models)
    if source is not None:
        return "strftime_now" in source
    files = (*folder.glob("*.jinja"), *folder.glob("*/*.jinja"), *folder.glob("*chat_template*.json"))
    return any(
        b"strftime_now" in file.read_bytes() for file in (*files, folder / "tokenizer_config.json") if file.is_file()
    )


def check_time_is_set(models: ModelConfig, folder: Path, role: str) -> None:
    """Refuses a model whose chat template prints the time, where no time is set: it would judge otherwise each day.

    Raises:
        UsageError: `role` names the model.
    """
    if models.template_time is None and prints_time(models, folder):
        raise UsageError(
            f"{role}: the chat template of {folder} prints the time, so that its verdicts would change each day: set "
            "one with --set model.template_time=2026-01-31T12:00:00"
        )


def with_template_time(
    models: ModelConfig, policy: Path, file: Path, report: Report = no_report, *, copy: str | None = None
) -> ModelConfig:
    """The config with the time that the policy's template prints: that of `file`, which is written the first time.

    Nothing changes where `template_time` is set, or the template prints no time.

    Args:
        copy: the time of the first call as it was kept elsewhere, for a file that is gone or damaged.
    """
    if models.template_time is not None or not prints_time(models, policy):
        return models
    stored = read_sealed(file, _KEY)
    if stored is not None:
        return models.model_copy(update={"template_time": stored["time"]})
    time = copy or datetime.now().isoformat(timespec="seconds")
    write_sealed(file, {"time": time}, _KEY)
    if copy is None:
        text = f"the chat template prints the time: {time} from now on, kept in {file} (model.template_time)"
        report("note", text=text)
    return models.model_copy(update={"template_time": time})
