"""A run of one round, made once in a session."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from own_run import STAGE_NAMES, Events, own_config
from tiny_models import make_mistral

from dice_py.config.run import RunConfig
from dice_py.reporting.html import write_report
from dice_py.runs import loop


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return own_config(tmp_path_factory.mktemp("own"), make_mistral)


@pytest.fixture(scope="session")
def complete_run(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run of one round. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "complete"
    events = Events()
    metrics = loop.run(config, folder, events, after_round=write_report)
    assert list(metrics) == ["round-01"]
    assert events.stages() == [(name, status) for name in STAGE_NAMES for status in ("running", "done")]
    return folder


@pytest.fixture
def copy(complete_run: Path, tmp_path: Path) -> Path:
    """A copy of `complete_run`, to change."""
    return shutil.copytree(complete_run, tmp_path / "copy")
