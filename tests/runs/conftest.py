"""The config of a run on tiny models."""

from __future__ import annotations

import pytest
from own_run import own_config
from tiny_models import make_mistral

from dice_py.config.run import RunConfig


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return own_config(tmp_path_factory.mktemp("own"), make_mistral)
