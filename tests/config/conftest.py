"""Fixtures of the tests of the config."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def yaml_file(tmp_path: Path):
    def write(text: str, name: str = "config.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write
