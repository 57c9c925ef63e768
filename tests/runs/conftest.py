"""The config of a run on tiny models, and runs whose stages start no process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from damage import prepare_nothing, run_inline
from own_run import own_config
from tiny_models import make_mistral

from dice_py.compute.stage_process import WarmPool
from dice_py.config.run import RunConfig
from dice_py.runs import folder as run_folder


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return own_config(tmp_path_factory.mktemp("own"), make_mistral)


@pytest.fixture(scope="module")
def inline_stages() -> Iterator[None]:
    """Stages run in this process, which has torch already: a resume takes a second and not twenty."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "run_in_subprocess", run_inline)
        patch.setattr(WarmPool, "prepare", prepare_nothing)
        yield
