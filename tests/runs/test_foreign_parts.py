"""A run folder with parts of another run, files of the user's own, and files of types that the run does not write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damage import assert_same_results, notes, results
from own_run import Events, own_config
from tiny_models import make_mistral

from dice_py.errors import DataError
from dice_py.reporting.html import write_report
from dice_py.runs import loop
from dice_py.runs.status import run_status
from dice_py.runs.verify import verify_run
from dice_py.storage.files import read_json, read_sealed, write_sealed

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("inline_stages")]

NESTED = "[" * 100_000
DIGITS = '{"a": ' + "9" * 6000 + "}"


@pytest.fixture(scope="module")
def finished(inline_stages: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two rounds. Read only."""
    base = tmp_path_factory.mktemp("foreign")
    config = own_config(base / "own", make_mistral, "rounds=2", "train.save_steps=")
    loop.run(config, base / "run", after_round=write_report)
    return base / "run"


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "copy")


def resume(folder: Path, *assignments: str) -> list[str]:
    """The stages that were made again."""
    events = Events()
    loop.resume(folder, events, assignments=assignments, after_round=write_report)
    return [name for name, status in events.stages() if status == "done"]


@pytest.mark.parametrize(
    "text",
    [*(pytest.param(text, marks=pytest.mark.long) for text in ("[1, 2]", "{}", DIGITS)), "5", NESTED],
    ids=["list", "object", "long", "number", "deep"],
)
@pytest.mark.parametrize("name", ["mine/mining.json", "evaluate/metrics.json"])
def test_a_file_of_a_later_round_does_not_end_the_report(copy: Path, finished: Path, name: str, text: str) -> None:
    """The report after round 1 also reads round 2, which is still to be made again."""
    (copy / "round-02" / name).write_text(text)
    (copy / "round-01/evaluate/metrics.json").unlink()
    assert resume(copy) == ["round-01/evaluate", f"round-02/{name.partition('/')[0]}"]
    assert_same_results(copy, finished)


@pytest.mark.parametrize("text", [NESTED, pytest.param(DIGITS, marks=pytest.mark.long)], ids=["deep", "long"])
@pytest.mark.parametrize(
    "name", ["events.jsonl", "manifest.json", "config.yaml", "profile.json", "inputs/checked.json"]
)
def test_json_that_python_does_not_read_is_damage(copy: Path, finished: Path, name: str, text: str) -> None:
    (copy / name).write_text(text)
    if name == "manifest.json":
        with pytest.raises(DataError, match="is damaged"):
            run_status(copy)
    else:
        assert run_status(copy)["state"] == "finished"
    write_report(copy)
    resume(copy)
    assert_same_results(copy, finished)
    assert verify_run(copy)["damaged"] == []


def test_files_of_the_users_own_are_no_damage(copy: Path) -> None:
    names = [
        "my.parquet",
        "notes/metrics.json",
        "round-01/mine/analysis.parquet",
        "round-01/bench/mining.json",
        "x.txt",
    ]
    for name in names:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("mine")
    found = verify_run(copy)
    assert (found["damaged"], found["missing"]) == ([], [])
    assert resume(copy) == []
    assert all((copy / name).read_text() == "mine" for name in names)


def test_a_file_that_looks_like_one_of_the_runs_is_damage(copy: Path) -> None:
    (copy / "round-01/generate/generations-00009.parquet").write_text("mine")
    assert verify_run(copy)["damaged"] == [str(copy / "round-01/generate/generations-00009.parquet")]


def with_config(folder: Path, **changes: Any) -> None:
    """Writes a manifest whose copy of the config differs, as one of another run does."""
    stored = read_sealed(folder / "manifest.json")
    assert stored is not None
    write_sealed(folder / "manifest.json", {**stored, "config": {**stored["config"], **changes}}, "manifest")


def test_config_and_manifest_of_different_runs(copy: Path, finished: Path) -> None:
    """Neither is damaged, and which one is of this run cannot be known: to guess would make all of it again."""
    with_config(copy, seed=7)
    before = results(copy)
    assert verify_run(copy)["damaged"] == [str(copy / "config.yaml")]
    for work in (run_status, loop.resume):
        with pytest.raises(DataError, match=r"config\.yaml and .*manifest\.json are of different runs \(seed\)"):
            work(copy)
    assert results(copy) == before
    (copy / "manifest.json").unlink()  # as the sentence has it
    resume(copy)
    assert_same_results(copy, finished)


def test_a_kill_between_the_two_copies_of_a_changed_config(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dice_py.runs.stored_config.write_sealed_text", killed)
        with pytest.raises(Exception, match="interrupted"):
            loop.resume(copy, assignments=["mine.min_margin=1e-9"])
    assert verify_run(copy)["damaged"] == []
    events = Events()
    loop.resume(copy, events)
    assert ("round-01/mine", "done") in events.stages()
    assert not any("set aside" in note for note in notes(events))
    assert "min_margin: 1.0e-09" in (copy / "config.yaml").read_text()


def test_a_config_that_is_gone_is_in_the_manifest(copy: Path) -> None:
    (copy / "config.yaml").unlink()
    assert run_status(copy)["state"] == "finished"
    assert verify_run(copy)["missing"] == [str(copy / "config.yaml")]
    assert resume(copy) == []


def test_a_manifest_that_is_gone_is_missing(copy: Path, finished: Path) -> None:
    (copy / "manifest.json").unlink()
    assert verify_run(copy)["missing"] == [str(copy / "manifest.json")]
    resume(copy)
    assert_same_results(copy, finished)
    assert verify_run(copy)["missing"] == []


def changed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    stored = read_json(folder / "manifest.json")
    change(stored)
    write_sealed(folder / "manifest.json", stored, "manifest")


@pytest.mark.parametrize("outside", ["../outside.parquet", "/{}/outside.parquet", "a\0b"])
def test_a_manifest_that_names_files_elsewhere(copy: Path, finished: Path, outside: str) -> None:
    """A stage's file that is not as it was written is renamed: one outside of the folder is not the run's."""
    other = copy.parent / "outside.parquet"
    other.write_text("a file of somebody's own")
    name = outside.format(copy.parent)
    changed(copy, lambda stored: stored["stages"]["round-01/mine"]["files"][0].update(file=name))
    with pytest.raises(DataError, match="is damaged"):
        run_status(copy)
    resume(copy)
    assert other.read_text() == "a file of somebody's own"
    assert_same_results(copy, finished)


@pytest.mark.parametrize("field", ["seconds", "counts", "files"])
def test_a_stage_without_a_field_is_made_again(copy: Path, finished: Path, field: str) -> None:
    changed(copy, lambda stored: stored["stages"]["round-01/mine"].pop(field))
    assert resume(copy) == ["round-01/mine"]
    assert_same_results(copy, finished)


def test_a_report_of_a_manifest_without_models(copy: Path) -> None:
    changed(copy, lambda stored: stored.update(policy="x", reference=None))
    page = write_report(copy).read_text()
    assert page.count("not known: the manifest does not name it") == 2


def test_a_mining_file_of_other_types_is_named_in_the_report(copy: Path) -> None:
    file = copy / "round-01/mine/mining.json"
    write_sealed(file, {**read_json(file), "curve": None, "margin_quantiles": "x"}, "another")
    assert "the mining of round-01 (mining.json, distributions.json) cannot be shown" in write_report(copy).read_text()


def test_events_with_other_fields_are_left_out(copy: Path) -> None:
    lines = [json.loads(line) for line in (copy / "events.jsonl").read_text().splitlines()]
    odd: list[Any] = [None, "x", [], {}, 10**400, True]
    for number, event in enumerate(lines):
        for name in event.keys() - {"event", "time"}:
            event[name] = odd[number % len(odd)]
    (copy / "events.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in lines))
    assert resume(copy) == []
