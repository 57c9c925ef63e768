"""The file of train.accelerate_config is looked for before anything is made."""

from __future__ import annotations

from pathlib import Path

import pytest
from own_config import OWN

from dice_py.config.loading import resolve
from dice_py.errors import UsageError


@pytest.mark.parametrize("named", ["absent.yaml", ".", "/dev/null", "~nobody-of-that-name/a.yaml", "a" * 300])
def test_an_accelerate_config_that_is_not_there(tmp_path: Path, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="does not exist") as caught:
        resolve([], [f"train.accelerate_config={named}"], OWN)
    assert f"train.accelerate_config: {named} does not exist" in str(caught.value)


def test_an_accelerate_config_that_is_there(tmp_path: Path) -> None:
    file = tmp_path / "accelerate.yaml"
    file.write_text("num_processes: 1\n")
    assert resolve([], [f"train.accelerate_config={file}"], OWN).train.accelerate_config == str(file)
