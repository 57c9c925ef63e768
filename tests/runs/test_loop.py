"""The loop: the models of each stage of a round, and the keys that follow from them. No model is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from faked_stages import faked_stages

from dice_py.config.rounds import RoundsConfig
from dice_py.config.run import RunConfig
from dice_py.runs import loop
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
