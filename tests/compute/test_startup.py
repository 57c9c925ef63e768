"""What a worker leaves out of its imports."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import worker_works as works

from dice_py.compute.stage_process import run_in_subprocess
from dice_py.events import no_report


def test_transformers_imports_no_packages_of_other_tasks(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn, whose import is what is left out")
    work = functools.partial(works.import_models, ["sklearn", "scipy"])
    there = run_in_subprocess(work, log=tmp_path / "log", remedy="", report=no_report)
    assert there == {"sklearn": False, "scipy": False}
