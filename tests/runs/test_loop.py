"""The loop: the models of each stage of a round, and the keys that follow from them. No model is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from damage import notes
from faked_stages import faked_stages
from own_run import Events

from dice_py.config.rounds import RoundsConfig
from dice_py.config.run import RunConfig
from dice_py.errors import DiskFullError
from dice_py.runs import loop
from dice_py.runs.status import run_status
from dice_py.stages.registry import ROUND_STAGES
from dice_py.storage.files import read_json


@pytest.mark.parametrize("reward_reference", ["previous", "initial"])
def test_the_reference_moves_or_stays(
    config: RunConfig, reward_reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config.model_copy(update={"rounds": RoundsConfig(count=3), "reward_reference": reward_reference})
    folder = tmp_path / "run"
    given = faked_stages(monkeypatch)
    loop.run(config, folder)
    first, initial = Path(str(config.model.policy)), Path(str(config.model.reference))
    policies = [first, *(folder / f"round-{number:02d}" / "train" / "model" for number in (1, 2, 3))]
    # Round t's rewards are log π_t − log π_ref; after it, the next round's are what is measured.
    references = [initial, *policies[:3]] if reward_reference == "previous" else [initial] * 4
    expected: list[tuple[Any, ...]] = []
    for t in range(3):
        expected += [
            ("generate", policies[t]),
            ("score", policies[t], references[t]),
            ("train", policies[t]),
            ("evaluate", policies[t + 1], references[t + 1], first, initial),
        ]
    assert given == expected
    # The order of the work says nothing of what a resume takes for granted; the keys do.
    stages = read_json(folder / "manifest.json")["stages"]
    assert len({stages[f"round-{number:02d}/score"]["key"] for number in (1, 2, 3)}) == 3


def test_another_reference_is_another_key(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {}
    for name in ("previous", "initial"):
        changed = config.model_copy(update={"rounds": RoundsConfig(count=2), "reward_reference": name})
        faked_stages(monkeypatch)
        loop.run(changed, tmp_path / name)
        keys[name] = {
            stage: entry["key"] for stage, entry in read_json(tmp_path / name / "manifest.json")["stages"].items()
        }
    same = {stage for stage, key in keys["previous"].items() if keys["initial"][stage] == key}
    first = [f"round-01/{stage}" for stage in ROUND_STAGES if stage != "evaluate"]
    assert same == {*first, "round-02/generate"}


def test_the_page_is_written_before_a_round_trains_and_after_it(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faked_stages(monkeypatch)
    done: list[list[str]] = []

    def note_stages(folder: Path) -> None:
        stages = read_json(folder / "manifest.json")["stages"]
        done.append([name for name, entry in stages.items() if entry["status"] == "done"])

    folder = tmp_path / "run"
    two = config.model_copy(update={"rounds": RoundsConfig(count=2)})
    loop.run(two, folder, after_round=note_stages)
    assert [stages[-1] for stages in done] == [
        "round-01/inspect", "round-01/evaluate", "round-02/inspect", "round-02/evaluate",
    ]  # fmt: skip
    # Where nothing is trained, only the rounds' ends are left.
    done.clear()
    loop.resume(folder, after_round=note_stages)
    assert len(done) == 2


def test_a_page_that_fails_is_a_note_and_a_full_disk_is_none(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faked_stages(monkeypatch)

    def fail(folder: Path) -> None:
        raise ZeroDivisionError("of the page")

    events = Events()
    loop.run(config, tmp_path / "run", events, after_round=fail)
    said = [text for text in notes(events) if "the report is not written" in text]
    assert len(said) == 2
    assert said[0].startswith("warning: the report is not written: ZeroDivisionError: of the page.")
    assert f"dice report {tmp_path / 'run'}" in said[0]
    assert run_status(tmp_path / "run")["state"] == "finished"

    def fill(folder: Path) -> None:
        raise DiskFullError("no room left on the disk")

    with pytest.raises(DiskFullError):
        loop.resume(tmp_path / "run", after_round=fill)
