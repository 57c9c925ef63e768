"""The base of all stages: a frozen, typed job with its inputs as fields, a key, and `run`.

The run loop (runs/loop.py) and the command line build the same jobs, so a stage's key is built in one place.
stages/registry.py lists the stages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dice_py.config.shared import ModelConfig
from dice_py.events import Report, no_report
from dice_py.models.own_template import template_key
from dice_py.storage.files import read_sealed, write_sealed
from dice_py.storage.keys import digest
from dice_py.storage.parquet import intact_key
from dice_py.storage.removed import was_removed
from dice_py.training.checkpoints import is_trained

StageFile = tuple[Path, str]
"""A file, or a model folder, that a stage has written, and its key."""

SKIPPED = "skipped"
"""The count that says why a stage had nothing to do."""

FAILURE = "failure"
"""The count that says why a stage has no result, where a run goes on without it."""


@dataclass(frozen=True)
class StageResult:
    """What a stage has written, and its counts and measures for the manifest (ready for JSON)."""

    files: list[StageFile]
    counts: dict[str, Any]


class Job(ABC):
    """One stage with its inputs. Subclasses are frozen dataclasses, and picklable: most run in a process of their own.

    The module of a job imports neither torch nor transformers at the top, since the parent process imports it too.
    """

    @abstractmethod
    def key_fields(self) -> dict[str, Any]:
        """All that decides the stage's result, by name (JSON values): inputs, config, models, versions of libraries.

        Names are those of config keys where there is one, so that a resume can say which of them changed. No value has
        a path, a time, or anything else that differs between two equal runs.
        """

    def key(self) -> str:
        """The digest of `key_fields`."""
        return digest(type(self).__name__, self.key_fields())

    @abstractmethod
    def run(self, report: Report = no_report) -> StageResult:
        """Does the work. A stage with several shards keeps those that already carry their key.

        Raises:
            DamagedError: an artifact that it reads is not as it was written.
        """

    @property
    def needs_process(self) -> bool:
        """Whether the work is for a process of its own, where its stage has one: it holds a model."""
        return True

    def incomplete(self, files: Sequence[StageFile]) -> list[Path]:
        """Those files and model folders of an earlier run of this job that are missing or not as they were written.

        It reads all of them. Those that were removed to free their space are not missing.
        """
        return [file for file, key in files if not (_is_intact(file, key) or _was_removed(file, key))]


def _is_intact(file: Path, key: str) -> bool:
    if file.suffix == ".json":
        return read_sealed(file, key) is not None
    return intact_key(file) == key if file.suffix == ".parquet" else is_trained(file, key)


def _was_removed(file: Path, key: str) -> bool:
    removed = was_removed(file)
    return removed is not None and file.name in removed.files and removed.files[file.name].get("key") == key


def skip(out: Path, key: str, why: str, report: Report) -> StageResult:
    """The result of a stage that has nothing to do: a file that says why, and the count `skipped`."""
    report("note", text=f"{out.parent.name}/{out.name} is skipped: {why}")
    file = out / "skipped.json"
    write_sealed(file, {SKIPPED: why}, key)
    return StageResult([(file, key)], {SKIPPED: why})


def model_key_fields(models: ModelConfig) -> dict[str, Any]:
    """The fields of config `model` that change results. `model_identity` stands for the weights."""
    return models.model_dump(include={"dtype", "device", "attn_implementation"}) | template_key(models)
