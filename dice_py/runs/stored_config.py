"""The config that a run keeps in `config.yaml`, with its digest in the last line. The manifest has a copy of it.

Paths in it are absolute, so that a run can be resumed from any working directory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dice_py.config.loading import dump, load_resolved
from dice_py.config.run import RunConfig
from dice_py.errors import DataError, DiceError, UsageError
from dice_py.events import Report
from dice_py.models.own_template import NO_TEMPLATE, is_template_text
from dice_py.rows.sources import absolute_name
from dice_py.runs.reasons import changes, field_values, listed
from dice_py.storage.digests import file_state
from dice_py.storage.files import Manifest, write_sealed_text
from dice_py.storage.integrity import set_aside

CONFIG_FILE = "config.yaml"
LOG = "events.jsonl"
"""All that a run has that was killed before its config was written."""


def check_folder(config: RunConfig, folder: Path) -> None:
    """Checks that a run of this config may be made, or continued, in a folder.

    Raises:
        UsageError: the folder holds a run of another config, or something else.
    """
    stored = folder / CONFIG_FILE
    if stored.exists() or has_config(folder):
        changed = changed_settings(config, folder)
        if changed:
            raise UsageError(
                f"{folder} holds a run of another config (see {stored}): {listed(changed)}. Give another --run-dir, "
                f"continue that run as it is with: dice resume {folder}, or change it with: dice resume {folder} "
                "--set section.key=value"
            )
    elif folder.exists() and any(not path.name.startswith(".") and path.name != LOG for path in folder.iterdir()):
        raise UsageError(f"{folder} is not empty and holds no run; give another --run-dir")


def changed_settings(config: RunConfig, folder: Path) -> list[str]:
    """What a config changes in the run that has begun in a folder (`reasons.changes`).

    Nothing where no stage has begun: such a run has nothing to lose, and may be started with another config. Nothing
    either where the stored config is damaged and has no copy: the keys of the artifacts decide what is kept.
    """
    if not (Manifest(folder / "manifest.json").data["stages"] or any(folder.glob("round-*"))):
        return []
    try:
        before = with_absolute_paths(stored_config(folder)[0])
    except DataError:
        return []
    return changes(settings(before), settings(with_absolute_paths(config)))


def store_config(folder: Path, config: RunConfig, manifest: Manifest, report: Report) -> list[str]:
    """Writes the config of a run atomically, and its copy into the manifest; returns what changed, which is reported.

    A stored config that is not as the run wrote it is set aside first.
    """
    file = folder / CONFIG_FILE
    changed: list[str] = []
    if file.is_dir():
        set_aside(file, report, "is a folder, where a file belongs")
    if file.exists():
        try:
            before = restore_config(folder, report)
        except DiceError:
            set_aside(file, report)
        else:
            changed = changes(settings(with_absolute_paths(before)), settings(config))
            if changed:
                report("note", text=f"settings changed: {listed(changed)}")
                manifest.data["config_before"] = before.model_dump(mode="json")
                # Of the settings before: until the run has gone through its rounds, a resume may need all of them.
                manifest.data.pop("outcome", None)
    # The copy first: after a kill in between, the file is the config before.
    manifest.data["config"] = config.model_dump(mode="json")
    manifest.save()
    text = f"{dump(config)}# To change a setting: dice resume RUN --set section.key=value\n"
    write_sealed_text(file, text, "# {}")
    return changed


def stored_config(folder: Path) -> tuple[RunConfig, str | None]:
    """The config of a run: that of its file, or the manifest's copy if the file is not as it was written.

    Returns:
        The config, and what is wrong with the file (None: nothing).

    Raises:
        UsageError: the file cannot be read as a config, and the manifest has no copy.
        DataError: the file is damaged, and the manifest has no copy; or both are whole, and of different runs.
    """
    path = folder / CONFIG_FILE
    state = file_state(path)
    copy = _copy(folder)
    if state == "intact":
        try:
            config = load_resolved(path)
        except DiceError:  # another file of ours, under this name
            if copy is None:
                raise
        else:
            differing = [] if copy is None else changes(settings(copy), settings(config))
            if copy is None or not differing:
                return config, None
            before = _copy(folder, "config_before")
            if before is not None and settings(before) == settings(config):
                return copy, None  # a kill came before the file was written
            raise DataError(
                f"{path} and {folder / 'manifest.json'} are of different runs ({listed(differing)}). Put the one back "
                "that is of this run; or remove the other one, and what it has is made again from this run's"
            )
    if state == "absent" and copy is not None:
        return copy, None
    if copy is None:
        if state == "damaged":
            raise DataError(
                f"{path} is damaged: it is not as it was written, and {folder / 'manifest.json'} has no copy. Start "
                f"the run again with its settings, as it was started: dice run … --run-dir {folder}. What is complete "
                "is kept"
            )
        return load_resolved(path), None  # written by an earlier version
    try:
        differing = changes(settings(copy), settings(load_resolved(path)))
    except DiceError:
        differing = ["it cannot be read"]
    return copy, f"is damaged, or was edited ({listed(differing) or 'only in spaces, comments or its digest'})"


def restore_config(folder: Path, report: Report) -> RunConfig:
    """`stored_config`; a file that is not as it was written is set aside, which a note says."""
    config, problem = stored_config(folder)
    if problem is not None:
        hint = "; to change a setting: dice resume RUN --set section.key=value"
        set_aside(folder / CONFIG_FILE, report, problem + hint)
    return config


def has_config(folder: Path) -> bool:
    """Whether the manifest has a copy of the config, whose file is gone."""
    return _copy(folder) is not None


def settings(config: RunConfig) -> dict[str, Any]:
    """All settings by dotted name."""
    return field_values(config.model_dump(mode="json"))


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The config with paths that do not depend on the working directory. Ids of the Hugging Face hub stay."""

    def absolute(section: Any, *names: str, of: Callable[[str], str] = _absolute) -> Any:
        values = {name: getattr(section, name) for name in names}
        return section.model_copy(update={name: of(value) for name, value in values.items() if value})

    models = {
        name: _absolute(value)
        for name in ("policy", "reference", "sft")
        if (value := getattr(config.model, name)) and _is_path(value)
    }
    template = config.model.chat_template
    if template is not None and template != NO_TEMPLATE and not is_template_text(template):
        models["chat_template"] = _absolute(template)
    data = absolute(config.data, "tools") if isinstance(config.data.tools, str) else config.data
    replay, evaluate = config.replay, config.evaluate
    judges = evaluate.judges
    named: dict[str, Any] = {}
    if judges.reward_model is not None and _is_path(judges.reward_model.model):
        named["reward_model"] = absolute(judges.reward_model, "model")
    if judges.implicit is not None:
        of_paths = [name for name in ("policy", "reference") if _is_path(getattr(judges.implicit, name))]
        named["implicit"] = absolute(judges.implicit, *of_paths)
    if judges.openai is not None:
        named["openai"] = absolute(judges.openai, "template")
    if named:
        evaluate = evaluate.model_copy(update={"judges": judges.model_copy(update=named)})
    if evaluate.command is not None:
        evaluate = evaluate.model_copy(update={"command_folder": _absolute(evaluate.command_folder or ".")})
    buffers = {name: absolute(buffer, "path", of=absolute_name) for name, buffer in replay.buffers.items()}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update=models),
            "data": absolute(data, "prompts", "replay", "eval_prompts", "eval_pairs", of=absolute_name),
            "replay": replay.model_copy(update={"buffers": buffers}) if buffers else replay,
            "generate": config.generate.model_copy(
                update={"from_files": [_absolute(name) for name in config.generate.from_files or []] or None}
            ),
            "train": absolute(config.train, "accelerate_config"),
            "evaluate": evaluate,
        }
    )


def _is_path(name: str) -> bool:
    try:
        return name.startswith((".", "~", "/")) or Path(name).exists()
    except OSError:  # longer than a path may be
        return False


def _absolute(name: str) -> str:
    try:
        return str(Path(name).expanduser().absolute())
    except RuntimeError:  # no such user; the error that names the file says so
        return name


def _copy(folder: Path, name: str = "config") -> RunConfig | None:
    copy = Manifest(folder / "manifest.json").data.get(name)
    try:
        return None if copy is None else RunConfig.model_validate(copy)
    except ValidationError:
        return None
