"""The world in the cache and in a run: it is made once, never replaced, and a run keeps its own copy."""

from __future__ import annotations

import contextlib
import shutil
import threading
from pathlib import Path

import pytest
from damage import empty, flip, notes
from own_run import Events

from dice_py.config.loading import resolve
from dice_py.config.stages import WorldConfig
from dice_py.runs.folder import Run
from dice_py.runs.inputs import Inputs, prepare
from dice_py.stages.world import WorldJob
from dice_py.synthetic.world import find_world, world_key

pytestmark = pytest.mark.slow

SIZES = {"sft_steps": 2, "offline_pairs": 40, "round_prompts": 40, "eval_prompts": 8, "eval_pairs": 8}
CONFIG = WorldConfig(**SIZES)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a small world. Read only."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DICE_CACHE", str(cache))
        # A making that was killed has left this.
        left = cache / "world" / f".{world_key(CONFIG)}.1.tmp"
        left.mkdir(parents=True)
        makers = [threading.Thread(target=WorldJob(CONFIG).run) for _ in range(2)]
        for maker in makers:
            maker.start()
        for maker in makers:
            maker.join()
        assert find_world(CONFIG) is not None
    return cache


@pytest.fixture
def cache(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = shutil.copytree(made, tmp_path / "cache")
    monkeypatch.setenv("DICE_CACHE", str(copy))
    return copy


def test_two_makers_make_one_world(made: Path) -> None:
    assert sorted(path.name for path in (made / "world").iterdir()) == sorted(
        [f".{world_key(CONFIG)}.lock", world_key(CONFIG)]
    )


def test_a_complete_world_is_never_replaced(cache: Path) -> None:
    folder = cache / "world" / world_key(CONFIG)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert WorldJob(CONFIG).run().files == [(folder, world_key(CONFIG))]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("name", ["world.json", "sft/model.safetensors", "policy/model/config.json", "prompts.parquet"])
def test_a_damaged_world_is_none(cache: Path, name: str) -> None:
    world = find_world(CONFIG)
    assert world is not None
    assert world.info()["round_prompts"] == 40
    flip(world.folder / name)
    assert find_world(CONFIG) is None


def prepared(folder: Path, report: Events) -> Inputs:
    """The inputs of a run in `folder`."""
    folder.mkdir(exist_ok=True)
    run = Run(folder, resolve([], [f"world.{name}={value}" for name, value in SIZES.items()]), report)
    with contextlib.closing(run):
        return prepare(run)


@pytest.mark.long
def test_a_run_does_not_depend_on_the_cache(cache: Path, tmp_path: Path) -> None:
    inputs = prepared(tmp_path / "run", Events())
    own = tmp_path / "run/inputs/world"
    assert inputs.policy == own / "policy/model"
    shutil.rmtree(cache)
    events = Events()
    assert prepared(tmp_path / "run", events) == inputs
    assert notes(events) == []


def test_a_damaged_copy_is_made_again_from_the_cache(cache: Path, tmp_path: Path) -> None:
    inputs = prepared(tmp_path / "run", Events())
    before = inputs.prompts.read_bytes()
    empty(inputs.prompts)
    events = Events()
    assert prepared(tmp_path / "run", events) == inputs
    assert inputs.prompts.read_bytes() == before
    (note,) = notes(events)
    assert "prompts.parquet is damaged" in note
    assert "set aside as world.damaged" in note
