"""In place of the Hugging Face hub of data sets: the loading of the package datasets itself, of a local folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest


class Hub:
    """Every id is the data set of one folder. `asked` has the (id, configuration, revision) of each call."""

    def __init__(self, folder: Path, commits: dict[str | None, str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.commits = str(folder), commits
        self.asked: list[tuple[str, str | None, str | None]] = []
        self.load = datasets.load_dataset_builder
        monkeypatch.setattr(datasets, "load_dataset_builder", self.builder)
        for name in ("get_dataset_config_names", "get_dataset_default_config_name"):
            real = getattr(datasets, name)
            monkeypatch.setattr(datasets, name, lambda path, real=real, **_: real(self.at(path)))

    def at(self, path: str) -> str:
        """The folder that is loaded: one that is there, or that of all ids."""
        return path if Path(path).is_dir() else self.folder

    def builder(self, path: str, name: str | None = None, revision: str | None = None) -> Any:
        if self.at(path) == path:
            return self.load(path, name=name, revision=revision)
        self.asked.append((path, name, revision))
        made = self.load(self.folder, name=name)
        made.hash = self.commits.get(revision, revision)
        return made
