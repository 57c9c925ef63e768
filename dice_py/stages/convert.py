"""Converts a GGUF file to a model folder in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dice_py.events import Report, no_report
from dice_py.models.gguf import converted_model, find_converted, gguf_key
from dice_py.stages.job import Job, StageFile, StageResult


@dataclass(frozen=True)
class ConvertJob(Job):
    """Converts a GGUF file, unless the cache has it (models/gguf.py). The model folder is the only file of the result.

    Raises, when run:
        UsageError: a package that this needs is not installed.
        DataError: a file that cannot be converted.
    """

    file: Path

    def key_fields(self) -> dict[str, Any]:
        """The file's digest, with the versions that convert it."""
        return {"file": gguf_key(self.file)}

    def key(self) -> str:
        """The key of the converted folder."""
        return gguf_key(self.file)

    def incomplete(self, files: Sequence[StageFile]) -> list[Path]:
        """The folder, unless it is in the cache."""
        return [] if find_converted(self.file) is not None else [file for file, _ in files]

    def run(self, report: Report = no_report) -> StageResult:
        """Converts the file."""
        return StageResult([(converted_model(self.file, report), self.key())], {})
