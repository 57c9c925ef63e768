"""Makes a model folder, in the cache, of what is none yet: a GGUF file, or an adapter and its base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dice_py.events import Report, no_report
from dice_py.models.sources import needs_conversion, resolve_model, source_key
from dice_py.stages.job import Job, StageFile, StageResult


@dataclass(frozen=True)
class ConvertJob(Job):
    """Converts a GGUF file (models/gguf.py) or merges an adapter (models/adapters.py), unless the cache has the result.

    The model folder is the only file of the result.

    Raises, when run:
        UsageError: a package that this needs is not installed.
        DataError: a file that cannot be converted, or an adapter that does not fit its base model.
    """

    name: str
    """As the user gave it: a GGUF file, a folder or a Hugging Face id."""
    revision: str | None
    """Branch, tag or commit on the hub; None: the default branch."""
    role: str
    """How error messages name the model, such as "--policy"."""

    def key_fields(self) -> dict[str, Any]:
        """The source's content."""
        return {"source": source_key(self.name, self.revision, self.role)}

    def key(self) -> str:
        """A digest of the source's content."""
        return source_key(self.name, self.revision, self.role)

    def incomplete(self, files: Sequence[StageFile]) -> list[Path]:
        """The folder, unless it is in the cache."""
        return [file for file, _ in files] if needs_conversion(self.name, self.revision, self.role) else []

    def run(self, report: Report = no_report) -> StageResult:
        """Converts or merges."""
        folder = resolve_model(self.name, self.revision, role=self.role, report=report)
        return StageResult([(folder, self.key())], {})
