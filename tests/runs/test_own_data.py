"""The run's copies of a user's data: what they are made of, what they outlive, and what makes them anew."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import polars as pl
import pytest
from data_hub import Hub
from notes import Notes

from dice_py.config.loading import resolve
from dice_py.errors import DataError
from dice_py.runs.folder import Run
from dice_py.runs.own_data import own_copies
from dice_py.runs.stored_config import with_absolute_paths

HUB_PAIRS = "an-owner/pairs:train_prefs[:20]"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def pairs(name: str, count: int = 30) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{name} {n}", "chosen": "a", "rejected": "b", "score_chosen": n, "score_rejected": 0}
        for n in range(count)
    ]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A folder of two files."""
    jsonl(tmp_path / "prompts" / "a.jsonl", [{"prompt": f"a {n}"} for n in range(10)])
    (tmp_path / "prompts" / "b.csv.gz").write_bytes(gzip.compress(b"question,prompt\n" + b"x,b 0\nx,b 1\n", mtime=0))
    return tmp_path / "prompts"


@pytest.fixture
def cloned(tmp_path: Path) -> Path:
    for split in ("train_prefs", "test_prefs"):
        jsonl(tmp_path / "cloned" / "data" / f"{split}-00000-of-00001.jsonl", pairs(split))
    return tmp_path / "cloned"


class Copies:
    """Brings the copies of one run folder up to date, as a start and every resume do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes: list[str] = []
        (folder / "inputs").mkdir(parents=True)

    def make(self, *assign: str, **data: object) -> str:
        """The key of the copies, with `data.…` set."""
        named = {name: str(value) for name, value in data.items()}
        config = resolve(
            [], ["evaluate.pairs=0", *assign], {"model": {"policy": "/p", "reference": "/r"}, "data": named}
        )
        log = Notes()
        run = Run(self.folder, config, log)
        try:
            return own_copies(run, self.outputs(*config.replay.buffers))
        finally:
            self.notes = log.texts
            run.close()

    def outputs(self, *buffers: str) -> dict[str, Path]:
        names = ("prompts", "offline", "eval_prompts", "eval_pairs", *(f"buffer {name}" for name in buffers))
        return {name: self.folder / "inputs" / f"{name.replace(' ', '-')}.parquet" for name in names}

    def column(self, name: str, column: str) -> list[Any]:
        return pl.read_parquet(self.outputs(name.removeprefix("buffer "))[name])[column].to_list()

    def said(self, words: str) -> bool:
        return any(words in note for note in self.notes)


@pytest.fixture
def copies(tmp_path: Path) -> Copies:
    return Copies(tmp_path / "run")


def test_every_place_takes_every_source(copies: Copies, prompts: Path, cloned: Path) -> None:
    copies.make(
        f"replay.buffers.more.path={cloned}:test_prefs[50%:]",
        "replay.margin_power=1",
        prompts=prompts,
        replay=f"{cloned}:train_prefs",
        eval_prompts=prompts / "b.*",
        eval_pairs=f"{cloned}:test_prefs[:3]",
    )
    assert copies.column("prompts", "where") == [f"a.jsonl, line {n}" for n in range(1, 11)]  # the others are held out
    assert copies.column("eval_prompts", "where") == ["b.csv.gz, line 2", "b.csv.gz, line 3"]
    assert copies.column("offline", "where") == [f"cloned:train_prefs, row {n}" for n in range(30)]
    assert copies.column("offline", "margin") == [float(n) for n in range(30)]
    assert copies.column("eval_pairs", "where") == [f"cloned:test_prefs, row {n}" for n in range(3)]
    assert copies.column("buffer more", "where") == [f"cloned:test_prefs, row {n}" for n in range(15, 30)]
    assert copies.said("no column 'margin', so it is 'score_chosen' − 'score_rejected' (30 rows)")


def test_the_copies_outlive_their_sources(copies: Copies, prompts: Path, cloned: Path) -> None:
    data = {"prompts": prompts, "replay": f"{cloned}:train_prefs"}
    key = copies.make(**data)
    shutil.rmtree(prompts)
    shutil.rmtree(cloned)
    assert copies.make(**data) == key
    copies.outputs()["offline"].unlink()
    with pytest.raises(
        DataError, match=rf"{prompts} is gone, and the run's own copy of the data in .* bring prompts back"
    ):
        copies.make(**data)


def test_a_changed_file_of_a_folder_is_noticed(copies: Copies, prompts: Path, cloned: Path) -> None:
    data = {"prompts": prompts, "replay": f"{cloned}:train_prefs"}
    key = copies.make(**data)
    jsonl(prompts / "c.jsonl", [{"prompt": "new"}])
    changed = copies.make(**data)
    assert changed != key
    assert copies.said("the data of the run is read again: prompts changed")
    jsonl(cloned / "data" / "train_prefs-00000-of-00001.jsonl", pairs("other", 31))
    assert copies.make(**data) not in (key, changed)
    assert copies.said("the data of the run is read again: replay changed")
    assert len(copies.column("offline", "where")) == 31
    assert copies.make(**data) == copies.make(**data)
    assert not copies.said("read again")


def test_other_data_that_is_not_there_is_an_error(copies: Copies, prompts: Path, cloned: Path) -> None:
    """The copies of what was named before are no copies of it."""
    copies.make(prompts=prompts, replay=f"{cloned}:train_prefs")
    with pytest.raises(DataError, match=r"other\.jsonl does not exist"):
        copies.make(prompts=prompts.parent / "other.jsonl", replay=f"{cloned}:train_prefs")


def test_a_run_stays_with_the_commit_of_the_hub(
    copies: Copies, prompts: Path, cloned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data: dict[str, Any] = {"prompts": prompts, "replay": HUB_PAIRS}
    commits: dict[str | None, str] = {None: "c0ffee"}
    with monkeypatch.context() as patch:
        hub = Hub(cloned, commits, patch)
        key = copies.make(**data)
        commits[None] = "decade"  # someone pushes
        before = len(hub.asked)
        assert copies.make(**data) == key
        assert len(hub.asked) == before
        # A lost copy is made of the same commit.
        copies.outputs()["offline"].unlink()
        assert copies.make(**data) == key
        assert {revision for _, _, revision in hub.asked[before:]} == {"c0ffee"}
        assert copies.said("reading the data set of the Hugging Face hub at c0ffee")
        assert copies.column("offline", "where") == [f"pairs:train_prefs, row {n}" for n in range(20)]
    assert copies.make(**data) == key  # without the hub
    with pytest.raises(DataError, match="as a data set of the hub it cannot be loaded"):
        copies.make(**{**data, "replay": "an-owner/pairs:train_prefs[:10]"})
    Hub(cloned, commits, monkeypatch)
    assert copies.make(**{**data, "replay": "an-owner/pairs:train_prefs[:10]"}) != key
    assert copies.said("the data of the run is read again: replay changed")


def test_names_that_do_not_depend_on_the_working_folder(
    prompts: Path, cloned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(prompts.parent)
    buffers = {"hub": {"path": HUB_PAIRS}, "split": {"path": "cloned:test_prefs[:3]"}}
    data = {"prompts": "prompts/*.jsonl", "replay": "cloned:train_prefs", "eval_prompts": "o/n@v1:c:s[:10%]"}
    data["eval_pairs"] = "prompts/absent.jsonl"
    models = {"policy": "/p", "reference": "/r"}
    config = resolve([], [], {"model": models, "data": data, "replay": {"buffers": buffers}})
    stored = with_absolute_paths(config)
    assert stored.data.prompts == f"{prompts}/*.jsonl"
    assert stored.data.replay == f"{cloned}:train_prefs"
    assert stored.data.eval_prompts == data["eval_prompts"]
    assert stored.data.eval_pairs == f"{prompts}/absent.jsonl"
    assert {name: buffer.path for name, buffer in stored.replay.buffers.items()} == {
        "hub": HUB_PAIRS,
        "split": f"{cloned}:test_prefs[:3]",
    }
    monkeypatch.chdir("/")
    assert with_absolute_paths(stored) == stored


def test_a_folder_that_is_gone_is_not_looked_for_on_the_hub(
    copies: Copies, prompts: Path, cloned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name may be one of the hub too: my/pairs."""
    monkeypatch.chdir(prompts.parent)
    cloned.rename(jsonl(Path("my/x"), []).parent / "pairs")
    key = copies.make(prompts=prompts, replay="my/pairs:train_prefs")
    assert copies.said("my/pairs:train_prefs: the local folder my/pairs, and not a data set of the hub")
    shutil.rmtree("my")
    hub = Hub(prompts, {None: "c0ffee"}, monkeypatch)
    assert copies.make(prompts=prompts, replay="my/pairs:train_prefs") == key
    assert not [path for path, _, _ in hub.asked if path == "my/pairs"]
