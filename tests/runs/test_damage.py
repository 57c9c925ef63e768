"""Damages each kind of artifact of a finished run in turn, resumes, and compares with the run that was not damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damage import DAMAGE, assert_same_results, empty, flip, notes, results, truncate
from own_run import Events, own_config
from tiny_models import make_mistral

from dice_py.config.loading import load_resolved
from dice_py.errors import DamagedError, DataError, UsageError
from dice_py.generation import shard
from dice_py.reporting.html import write_report
from dice_py.runs import loop
from dice_py.runs.status import run_status
from dice_py.runs.verify import verify_run
from dice_py.storage.keys import seed_for

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("inline_stages")]

CHANGES = ("rounds=1", "score.policy_logps=reuse_if_equal", "replay.buffer.capacity=50", "train.save_steps=")
# The stages that a resume makes again.
ONCE = {
    "config.yaml": [],
    "inputs/prompts.parquet": [],
    "inputs/offline.parquet": [],
    "inputs/eval_prompts.parquet": [],
    "inputs/eval_pairs.parquet": [],
    "inputs/checked.json": [],
    "buffer/round-01.parquet": [],
    "round-01/generate/prompts.parquet": [],
    "round-01/generate/generations-00001.parquet": ["generate"],
    "round-01/score/scores-00002.parquet": ["score"],
    "round-01/score/gate.json": ["score"],
    "round-01/mine/mined.parquet": ["mine"],
    "round-01/mine/mining.json": ["mine"],
    "round-01/replay/training_set.parquet": ["replay"],
    "round-01/inspect/pairs.parquet": ["inspect"],
    "round-01/inspect/distributions.json": ["inspect"],
    "round-01/train/model/model.safetensors": ["train"],
    "round-01/evaluate/metrics.json": ["evaluate"],
    "round-01/evaluate/samples/generations-00000.parquet": ["evaluate"],
    "evaluate/start/generations-00000.parquet": ["evaluate"],
}


@pytest.fixture(scope="module")
def finished(inline_stages: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Read only."""
    base = tmp_path_factory.mktemp("damage")
    loop.run(own_config(base / "own", make_mistral, *CHANGES), base / "run", after_round=write_report)
    return base / "run"


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of `finished`, to damage."""
    return shutil.copytree(finished, tmp_path / "copy")


def resume(folder: Path, *assignments: str) -> Events:
    events = Events()
    loop.resume(folder, events, assignments=assignments, after_round=write_report)
    return events


def made_again(events: Events) -> list[str]:
    return [name.removeprefix("round-01/") for name, status in events.stages() if status == "done"]


@pytest.mark.parametrize("number", range(len(ONCE)), ids=list(ONCE))
def test_what_is_damaged_is_set_aside_and_made_again(copy: Path, finished: Path, number: int) -> None:
    name, stages = list(ONCE.items())[number]
    kind = list(DAMAGE)[number % len(DAMAGE)]
    DAMAGE[kind](copy / name)
    found = verify_run(copy)
    assert (found["damaged"], found["missing"]) == ([str(copy / name)], [])
    events = resume(copy)
    assert made_again(events) == stages
    if not name.endswith("checked.json"):  # made again by a check, without a word
        assert any(str(Path(name).name) in note and "set aside" in note for note in notes(events)), kind
    assert_same_results(copy, finished)
    assert verify_run(copy)["damaged"] == []
    assert made_again(resume(copy)) == []


def test_samples_that_come_out_otherwise_are_scored_again(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whose kernels may take another token under the same seed."""
    flip(copy / "round-01/generate/generations-00001.parquet")
    kept = (copy / "round-01/score/scores-00000.parquet").stat().st_mtime_ns
    monkeypatch.setattr(shard, "seed_for", lambda *parts: seed_for("another", *parts))
    events = resume(copy)
    assert made_again(events)[:6] == ["generate", "score", "mine", "replay", "inspect", "train"]
    why = "round-01/score is made again (the first stage that is), because of: generations"
    assert why in notes(events)
    assert (copy / "round-01/score/scores-00000.parquet").stat().st_mtime_ns == kept
    assert made_again(resume(copy)) == []


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("round-01/generate/generations-00000.parquet", "round-01/generate/generations-00001.parquet"),
        ("inputs/prompts.parquet", "inputs/eval_prompts.parquet"),
        ("inputs/eval_prompts.parquet", "inputs/prompts.parquet"),
        ("inputs/offline.parquet", "inputs/eval_pairs.parquet"),
    ],
)
def test_another_file_in_the_place_of_one(copy: Path, finished: Path, source: str, place: str) -> None:
    """It is as it was written, and not the one that the manifest lists."""
    shutil.copy(copy / source, copy / place)
    found = verify_run(copy)
    assert (found["damaged"], found["missing"]) == ([str(copy / place)], [])
    events = resume(copy)
    assert any(Path(place).name in note for note in notes(events)) or place.startswith("round")
    assert_same_results(copy, finished)
    assert verify_run(copy)["damaged"] == []


@pytest.mark.parametrize("name", ["config.yaml", "inputs/prompts.parquet", "round-01/mine/mining.json"])
def test_a_folder_in_the_place_of_a_file_is_set_aside(copy: Path, finished: Path, name: str) -> None:
    (copy / name).unlink()
    (copy / name).mkdir()
    assert str(copy / name) in verify_run(copy)["damaged"]
    resume(copy)
    assert Path(f"{copy / name}.damaged").is_dir()
    assert_same_results(copy, finished)


@pytest.mark.parametrize(("source", "place"), [("manifest.json", "config.yaml"), ("config.yaml", "manifest.json")])
def test_config_and_manifest_in_each_others_place(copy: Path, finished: Path, source: str, place: str) -> None:
    shutil.copy(copy / source, copy / place)
    events = resume(copy)
    assert any(f"{place} is damaged" in note for note in notes(events))
    assert [event for event, _ in events.events if event in ("shard", "throughput")] == []
    assert_same_results(copy, finished)


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_manifest_is_made_again_from_the_files(copy: Path, finished: Path, kind: str) -> None:
    DAMAGE[kind](copy / "manifest.json")
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        run_status(copy)
    events = resume(copy)
    assert "is damaged: not as it was written. Files that are whole are kept" in notes(events)[0]
    # Nothing is sampled, scored or trained.
    assert [event for event, _ in events.events if event in ("shard", "throughput")] == []
    assert [fields for event, fields in events.events if event == "progress" and fields["stage"] == "train"] == []
    assert_same_results(copy, finished)
    assert run_status(copy)["state"] == "finished"


def test_a_file_that_is_gone_is_made_again(copy: Path, finished: Path) -> None:
    (copy / "round-01/mine/mining.json").unlink()
    found = verify_run(copy)
    assert (found["damaged"], found["missing"]) == ([], [str(copy / "round-01/mine/mining.json")])
    events = resume(copy)
    assert made_again(events) == ["mine"]
    assert any("mining.json is missing: made again" in note for note in notes(events))
    assert_same_results(copy, finished)


@pytest.mark.parametrize(
    "name", ["inputs/offline.parquet", "round-01/generate/prompts.parquet", "buffer/round-01.parquet"]
)
def test_files_of_no_stage_that_are_gone_are_made_again(copy: Path, finished: Path, name: str) -> None:
    (copy / name).unlink()
    assert verify_run(copy)["missing"] == [str(copy / name)]
    assert made_again(resume(copy)) == []
    assert_same_results(copy, finished)


@pytest.mark.parametrize("name", ["data.prompts", "data.replay", "data.eval_pairs"])
def test_a_setting_that_names_a_file_which_is_not_there(copy: Path, finished: Path, name: str) -> None:
    """The run's own copy does not stand for it, as it does for a source that is gone."""
    with pytest.raises(DataError, match=f"--set {name}: .*absent.jsonl does not exist"):
        resume(copy, f"{name}=absent.jsonl")
    assert made_again(resume(copy)) == []
    assert_same_results(copy, finished)


def test_config_and_manifest_damaged_together(copy: Path, finished: Path) -> None:
    flip(copy / "config.yaml")
    truncate(copy / "manifest.json")
    with pytest.raises(DataError, match=r"config\.yaml is damaged.*has no copy.*dice run"):
        resume(copy)
    # With the settings as they were given, all that is whole is kept.
    events = Events()
    loop.run(own_config(finished.parent / "own", make_mistral, *CHANGES), copy, events)
    assert not [event for event, _ in events.events if event in ("shard", "throughput")]
    assert_same_results(copy, finished)


def test_an_edited_config_is_said_to_be_one(copy: Path, finished: Path) -> None:
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("debias: linear", "debias: none"))
    events = resume(copy)
    assert "(mine.debias: linear → none)" in notes(events)[0]
    assert "dice resume RUN --set section.key=value" in notes(events)[0]
    assert made_again(events) == []
    assert_same_results(copy, finished)


def damage_at(stage: str, path: Path) -> Callable[..., None]:
    """A report that damages a file when a stage of round 1 begins, once."""
    seen: list[str] = []

    def report(event: str, **fields: Any) -> None:
        if event == "note":
            seen.append(fields["text"])
        begins = event == "stage" and fields["stage"] == f"round-01/{stage}" and fields["status"] == "running"
        if begins and "damaged" not in seen:
            seen.append("damaged")
            flip(path)

    report.notes = seen  # type: ignore[attr-defined]
    return report


@pytest.mark.parametrize(
    ("stage", "name", "compared"),
    [
        # Sums that came with the samples, and so the scores, may differ in their last digits.
        ("score", "generate/generations-00000.parquet", "round-01/generate/"),
        ("mine", "score/scores-00001.parquet", ""),
        ("train", "replay/training_set.parquet", ""),
        ("evaluate", "train/model/model.safetensors", ""),
    ],
)
def test_a_stage_that_meets_damage_has_it_made_again(
    copy: Path, finished: Path, stage: str, name: str, compared: str
) -> None:
    """A bit flips between the stage that writes a file and the one that reads it."""
    shutil.rmtree(copy / "round-01" / stage)
    report = damage_at(stage, copy / "round-01" / name)
    loop.resume(copy, report, after_round=write_report)
    seen = report.notes  # type: ignore[attr-defined]
    assert any("The files of the run are checked again" in note for note in seen)
    assert any("set aside" in note for note in seen)
    ours, theirs = results(copy), results(finished)
    assert [at for at in theirs if at.startswith(compared) and ours.get(at) != theirs[at]] == []
    assert verify_run(copy)["damaged"] == []


def test_damage_of_what_is_not_the_runs_own_ends_the_run(copy: Path) -> None:
    """Of a policy that another run trained, say."""
    model = copy / "round-01/train/model"
    flip(model / "model.safetensors")
    report = [f"model.policy={model}", f"model.reference={model}", "score.allow_same_model=true"]
    with pytest.raises(DamagedError, match=r"model\.safetensors is damaged"):
        resume(copy, *report)


# --- inputs and places


def test_sources_that_are_gone_do_not_matter(copy: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("prompts.jsonl", "pairs.jsonl"):
        (finished.parent / "own" / name).rename(finished.parent / "own" / f"away-{name}")
    try:
        events = resume(copy)
        assert made_again(events) == []
        assert not any("read again" in note for note in notes(events))
        empty(copy / "inputs/offline.parquet")
        with pytest.raises(DataError, match=r"is gone, and the run's own copy of the data .* is damaged"):
            resume(copy)
    finally:
        for name in ("prompts.jsonl", "pairs.jsonl"):
            (finished.parent / "own" / f"away-{name}").rename(finished.parent / "own" / name)
    assert made_again(resume(copy)) == []
    assert_same_results(copy, finished)


def test_a_moved_run_keeps_everything(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = tmp_path / "elsewhere" / "run"
    moved.parent.mkdir()
    copy.rename(moved)
    for path in moved.rglob("*"):
        path.touch()
    monkeypatch.chdir(moved.parent)
    events = resume(Path("run"))
    assert made_again(events) == []
    assert notes(events) == []


def test_relative_paths_are_resolved_when_the_run_is_made(
    copy: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished.parent)
    names = {"model.policy": "policy", "model.reference": "reference"}
    names |= {"data.prompts": "prompts.jsonl", "data.replay": "pairs.jsonl"}
    relative = [f"{key}=own/{name}" for key, name in names.items()]
    loop.run(own_config(Path("own").absolute(), make_mistral, *CHANGES, *relative), copy)
    config = load_resolved(copy / "config.yaml")
    assert config.model.policy == str(finished.parent / "own/policy")
    assert config.data.replay == str(finished.parent / "own/pairs.jsonl")
    monkeypatch.chdir(tmp_path)
    assert made_again(resume(copy)) == []


# --- links, and what verify says


@pytest.mark.parametrize("name", [".lock", "events.jsonl", "round-01", "inputs/prompts.parquet"])
def test_links_in_a_run_are_refused(copy: Path, tmp_path: Path, name: str) -> None:
    place, target = copy / name, tmp_path / "elsewhere"
    place.rename(target)
    place.symlink_to(target)
    before = {path: path.read_bytes() for path in [target, *target.rglob("*")] if path.is_file()}
    with pytest.raises(UsageError, match="is a symbolic link; a run writes only inside its own folder"):
        resume(copy)
    assert {path: path.read_bytes() for path in before} == before


def test_the_run_folder_itself_may_be_a_link(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(copy)
    assert made_again(resume(tmp_path / "link")) == []


def test_verify_names_every_file_once(copy: Path, dice: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = dice("status", copy, "--verify")
    assert code == 0
    assert out.startswith("nothing is damaged: ")
    artifacts = [
        path
        for path in sorted(copy.rglob("*"))
        if path.is_file() and path.suffix not in (".jsonl", ".log") and path.name not in (".lock", "progress.json")
    ]
    assert verify_run(copy)["files"] == len(artifacts)
    for number, path in enumerate(artifacts):
        if path.name not in ("manifest.json", "dice.json"):  # which name the others
            flip(path, seed=number)
    code, out, err = dice("status", copy, "--verify")
    assert code == 3
    expected = [str(path) for path in artifacts if path.name not in ("manifest.json", "dice.json")]
    assert sorted(out.splitlines()) == sorted(expected)
    assert f"{len(expected)} files of" in err
    flip(copy / "round-01/train/model/dice.json")
    flip(copy / "manifest.json")
    out = dice("status", copy, "--verify")[1]
    assert str(copy / "round-01/train/model/dice.json") in out.splitlines()
    assert str(copy / "manifest.json") in out.splitlines()
