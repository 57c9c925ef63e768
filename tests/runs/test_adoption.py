"""Stages that a run takes over from another run, because they have the same key."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from damage import flip
from own_run import Events

from dice_py.config.run import RunConfig
from dice_py.runs import loop
from dice_py.storage.files import Manifest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("inline_stages")]

SHARED = ["round-01/generate", "round-01/score", "round-01/mine"]
OWN = ["round-01/replay", "round-01/inspect", "round-01/train", "round-01/evaluate"]


@pytest.fixture(scope="module")
def other(config: RunConfig, inline_stages: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run. Read only."""
    folder = tmp_path_factory.mktemp("other") / "run"
    loop.run(config, folder)
    return folder


@pytest.fixture
def changed(config: RunConfig) -> RunConfig:
    """The config of a run that differs from `other` in its replay, and so in all that follows."""
    return config.model_copy(update={"replay": config.replay.model_copy(update={"gamma": 0.2})})


def _stages(folder: Path) -> dict[str, dict[str, str]]:
    return Manifest(folder / "manifest.json").data["stages"]


def _took(events: Events) -> list[str]:
    return [name for name, status in events.stages() if status == "kept"]


def test_what_has_the_same_key_is_taken_over(changed: RunConfig, other: Path, tmp_path: Path) -> None:
    events = Events()
    shared = loop.run(changed, tmp_path / "run", events, siblings=[other])
    alone = loop.run(changed, tmp_path / "alone")
    assert _took(events) == SHARED
    assert [name for name, status in events.stages() if status == "done"] == OWN
    assert shared == alone
    theirs = _stages(tmp_path / "alone")
    for name, entry in _stages(tmp_path / "run").items():
        assert (entry["key"], entry["counts"]) == (theirs[name]["key"], theirs[name]["counts"]), name
    # A resume needs the other run no more.
    again = Events()
    assert loop.resume(tmp_path / "run", again) == shared
    assert _took(again) == SHARED + OWN


def test_a_damaged_file_of_the_other_run_is_made_and_left(changed: RunConfig, other: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(other, tmp_path / "other")
    file = _stages(copy)["round-01/score"]["files"][0]["file"]
    flip(copy / file)
    before = (copy / file).read_bytes()
    events = Events()
    loop.run(changed, tmp_path / "run", events, siblings=[copy])
    assert _took(events) == ["round-01/generate", "round-01/mine"]
    assert (copy / file).read_bytes() == before
    assert (tmp_path / "run" / file).read_bytes() == (other / file).read_bytes()


def test_a_file_that_is_gone_is_made(changed: RunConfig, other: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(other, tmp_path / "other")
    (copy / _stages(copy)["round-01/generate"]["files"][0]["file"]).unlink()
    events = Events()
    loop.run(changed, tmp_path / "run", events, siblings=[copy, tmp_path / "no run"])
    assert _took(events) == ["round-01/score", "round-01/mine"]


def test_without_links_files_are_copied(
    changed: RunConfig, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(*_: object, **__: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_link)
    events = Events()
    loop.run(changed, tmp_path / "run", events, siblings=[other])
    assert _took(events) == SHARED
    for name in SHARED:
        for made in _stages(other)[name]["files"]:
            theirs, own = other / made["file"], tmp_path / "run" / made["file"]
            assert own.read_bytes() == theirs.read_bytes()
            assert not own.samefile(theirs)


def test_a_complete_run_is_taken_over_with_its_model(config: RunConfig, other: Path, tmp_path: Path) -> None:
    events = Events()
    loop.run(config, tmp_path / "run", events, siblings=[other])
    assert _took(events) == SHARED + OWN
    model = "round-01/train/model/model.safetensors"
    assert (tmp_path / "run" / model).samefile(other / model)
    # What this run makes again is its own.
    (tmp_path / "run" / model).unlink()
    loop.resume(tmp_path / "run")
    assert not (tmp_path / "run" / model).samefile(other / model)
    assert (tmp_path / "run" / model).read_bytes() == (other / model).read_bytes()
