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
from dice_py.storage.parquet import parquet_key

StageFile = tuple[Path, str]
"""A file, or a model folder, that a stage has written, and its key."""


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
    def key(self) -> str:
        """A digest of all that decides the stage's result: inputs, config, models, and versions of libraries."""

    @abstractmethod
    def run(self, report: Report = no_report) -> StageResult:
        """Does the work. A stage with several shards keeps those that already carry their key."""

    def is_complete(self, files: Sequence[StageFile]) -> bool:
        """True when the files of an earlier run of this job are all there under their keys."""
        return all(parquet_key(file) == key for file, key in files)


def model_key_fields(models: ModelConfig) -> dict[str, Any]:
    """The fields of config `model` that change results. `model_identity` stands for the weights."""
    return models.model_dump(include={"dtype", "device", "attn_implementation"})
