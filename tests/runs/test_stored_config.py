"""Which folders a run may be made in, after a kill at its very start."""

from __future__ import annotations

from pathlib import Path

import pytest

from dice_py.config.run import RunConfig
from dice_py.errors import UsageError
from dice_py.events import no_report
from dice_py.runs.stored_config import CONFIG_FILE, LOG, check_folder, store_config
from dice_py.storage.files import Manifest


def test_a_run_that_was_killed_before_its_config_was_written_is_started_again(
    config: RunConfig, tmp_path: Path
) -> None:
    (tmp_path / LOG).write_text("{}\n")
    check_folder(config, tmp_path)
    store_config(tmp_path, config, Manifest(tmp_path / "manifest.json"), no_report)
    (tmp_path / CONFIG_FILE).unlink()  # the manifest's copy is written first
    check_folder(config, tmp_path)
    (tmp_path / "round-01").mkdir()
    with pytest.raises(UsageError, match="seed"):
        check_folder(config.model_copy(update={"seed": config.seed + 1}), tmp_path)
    check_folder(config, tmp_path)


def test_a_folder_of_other_things_is_refused(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty and holds no run"):
        check_folder(config, tmp_path)
