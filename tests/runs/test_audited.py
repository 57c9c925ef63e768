"""`dice audit --run`: the models and pairs that it takes from a run folder, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from faked_stages import faked_stages

from dice_py.config.rounds import RoundsConfig
from dice_py.config.run import RunConfig
from dice_py.errors import DataError, UsageError
from dice_py.runs import loop
from dice_py.runs.audited import audited_round
from dice_py.storage.files import read_json


@pytest.fixture
def made(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A run of two rounds whose stages did nothing; the folders of its policies are there."""

    def make(reward_reference: str) -> Path:
        folder = tmp_path / reward_reference
        faked_stages(monkeypatch)
        changes = {"rounds": RoundsConfig(count=2), "reward_reference": reward_reference}
        loop.run(config.model_copy(update=changes), folder)
        for number in (1, 2):
            (folder / f"round-{number:02d}" / "train" / "model").mkdir(parents=True, exist_ok=True)
        return folder

    return make


def test_the_models_of_each_round(made: Callable[[str], Path], config: RunConfig) -> None:
    start, initial = Path(str(config.model.policy)), Path(str(config.model.reference))
    for reward_reference in ("previous", "initial"):
        folder = made(reward_reference)
        policies = [start, *(folder / f"round-{number:02d}" / "train" / "model" for number in (1, 2))]
        moved = reward_reference == "previous"
        previous = [initial, *(policies[:2] if moved else [initial, initial])]
        for number in range(3):
            found = audited_round(folder, number)
            assert (found.number, found.policy) == (number, policies[number])
            assert found.references == {"previous": previous[number], "initial": initial}
            assert found.pairs == folder / "inputs" / "eval_pairs.parquet"
        assert audited_round(folder, None) == audited_round(folder, 2)


def test_what_a_run_does_not_have(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = made("previous")
    with pytest.raises(UsageError, match=r"--round 3: .* has rounds 0 \(its start\) to 2 alone so far"):
        audited_round(folder, 3)
    with pytest.raises(UsageError, match="holds no run"):
        audited_round(tmp_path / "none", None)
    shutil.rmtree(folder / "round-01" / "train" / "model")
    with pytest.raises(DataError, match=r"the policy of round 1, .*, is gone; `dice resume"):
        audited_round(folder, 1)
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    values = read_json(manifest)
    assert values
    manifest.write_text(text.replace("done", "gone", 1))
    with pytest.raises(DataError, match="damaged"):
        audited_round(folder, 0)


@pytest.mark.usefixtures("in_this_process")
def test_the_start_of_a_run_on_tiny_models(
    made: Callable[[str], Path], dice: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    folder = made("previous")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    code, text, err = dice("audit", "--run", folder, "--round", 0, "--json", "--out", tmp_path / "out")
    assert code == 0, err
    figures = json.loads(text)
    pairs = folder / "inputs" / "eval_pairs.parquet"
    assert (figures["round"], figures["file"]) == (0, str(pairs))
    assert figures["comparisons"] == pl.read_parquet(pairs).height
    assert "initial is the same model as previous" in err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before  # nothing is changed
