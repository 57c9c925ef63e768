"""Data sets that the package datasets reads: folders with splits, `save_to_disk`, and the hub (out of reach here)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import polars as pl
import pytest
from data_hub import Hub, serve_hub
from notes import Notes
from places import ROOT

from dice_py.data import read_pairs, read_prompts
from dice_py.errors import DataError, UsageError
from dice_py.rows.data_sets import DataSet, commit_of
from dice_py.rows.sources import find_source


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    assert datasets.is_progress_bar_enabled()


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asked(name: str, count: int = 10) -> list[dict[str, Any]]:
    return [{"prompt": f"{name} {n}"} for n in range(count)]


@pytest.fixture
def cloned(tmp_path: Path) -> Path:
    """A data set's repository, as UltraFeedback's: shards by split."""
    for split, count in (("train_prefs", 10), ("test_prefs", 4)):
        jsonl(tmp_path / "cloned" / "data" / f"{split}-00000-of-00001.jsonl", asked(split, count))
    (tmp_path / "cloned" / "README.md").write_text("# A data set\n")
    return tmp_path / "cloned"


def read(written: Path | str) -> list[tuple[str, str]]:
    prompts = read_prompts(written)
    return [(turns[0]["content"], where) for turns, where in prompts.select("messages", "where").iter_rows()]


def refused(written: Path | str | DataSet) -> str:
    with pytest.raises(DataError) as error:
        read_prompts(written)
    return str(error.value)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("train_prefs", [("train_prefs", n) for n in range(10)]),
        ("train_prefs[:3]", [("train_prefs", n) for n in range(3)]),
        ("train_prefs[80%:]", [("train_prefs", 8), ("train_prefs", 9)]),
        ("train_prefs[-1:]+test_prefs[1:2]", [("train_prefs", 9), ("test_prefs", 1)]),
        ("default:test_prefs[:1]", [("test_prefs", 0)]),
    ],
)
def test_splits_of_a_folder(cloned: Path, spec: str, expected: list[tuple[str, int]]) -> None:
    """Rows have their number in the complete split."""
    assert read(f"{cloned}:{spec}") == [(f"{split} {n}", f"cloned:{split}, row {n}") for split, n in expected]


def test_a_split_that_is_not_there_is_told_the_others(cloned: Path) -> None:
    for spec in ("train", "train[:3]"):
        said = refused(f"{cloned}:{spec}")
        assert said == f"{cloned}:{spec}: there is no split 'train'; its splits are test_prefs, train_prefs"
    assert "[a:b]" in refused(f"{cloned}:train_prefs[a:b]")
    assert f"name one, as {cloned}:test_prefs" in refused(DataSet("x", str(cloned)))
    assert "BuilderConfig 'other' not found. Available: ['default']" in refused(f"{cloned}:other:train_prefs")


def test_configurations_of_a_folder(cloned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = [
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: data/{name}_prefs-*"
        for name in ("train", "test")
    ]
    (cloned / "README.md").write_text("---\nconfigs:\n" + "\n".join(configs) + "\n---\n")
    assert "(test:train, train:train): name one" in refused(cloned) or "(train:train, test:train)" in refused(cloned)
    said = refused(f"{cloned}:train")
    assert "has several configurations (" in said
    assert f"name one and a split, as {cloned}:t" in said
    assert read(f"{cloned}:test:train[:1]") == [("test_prefs 0", "cloned:train, row 0")]
    # What the README names is the data, where there is one split.
    (cloned / "README.md").write_text("---\nconfigs:\n" + configs[0] + "\n---\n")
    monkeypatch.chdir(cloned.parent)
    assert read("cloned") == read(cloned)
    assert [where for _, where in read(cloned)] == [
        f"data/train_prefs-00000-of-00001.jsonl, line {n}" for n in range(1, 11)
    ]


def test_the_content_of_a_split_is_that_of_its_files(cloned: Path) -> None:
    def digest(spec: str) -> str:
        return find_source(f"{cloned}:{spec}").digest()

    before = {spec: digest(spec) for spec in ("train_prefs", "train_prefs[:3]", "test_prefs")}
    assert len(set(before.values())) == 3
    jsonl(cloned / "data" / "test_prefs-00000-of-00001.jsonl", asked("other"))
    assert {spec for spec, known in before.items() if digest(spec) != known} == {"test_prefs"}
    assert read(f"{cloned}:test_prefs[:1]") == [("other 0", "cloned:test_prefs, row 0")]


def test_prompts_as_text_and_as_messages_in_one_column(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    jsonl(tmp_path / "mixed" / "train.jsonl", [{"prompt": "one"}, {"prompt": turns}])
    assert read_prompts(f"{tmp_path / 'mixed'}:train")["messages"].to_list()[1] == turns


def test_saved_data_sets(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n}", "chosen": "a", "rejected": "b", "at": None} for n in range(5)]
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select([4])}).save_to_disk(tmp_path / "two")
    pairs = read_pairs(tmp_path / "one")
    assert pairs["where"].to_list() == [f"one:train, row {n}" for n in range(5)]
    assert pairs["prompt"].to_list()[4] == [{"role": "user", "content": "q4"}]
    assert [prompt for prompt, _ in read(f"{tmp_path / 'one'}[3:]")] == ["q3", "q4"]
    assert [prompt for prompt, _ in read(f"{tmp_path / 'two'}:train[:40%]")] == ["q0", "q1"]
    assert read(f"{tmp_path / 'two'}:test") == [("q4", "two:test, row 0")]
    assert "has several splits, which are not read as one (train, test)" in refused(tmp_path / "two")
    assert "there is no split 'dev'; its splits are train, test" in refused(f"{tmp_path / 'two'}:dev")
    assert "has no configuration 'c'" in refused(f"{tmp_path / 'two'}:c:train")
    before = find_source(tmp_path / "one").digest()
    assert before != find_source(f"{tmp_path / 'one'}[:2]").digest()
    next((tmp_path / "one").glob("*.arrow")).unlink()
    assert "cannot be loaded by the package datasets (" in refused(tmp_path / "one")
    assert find_source(tmp_path / "one").digest() != before


def test_other_formats_of_datasets(tmp_path: Path) -> None:
    """Files that are not read here, but that datasets reads: with the split named."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "train.txt").write_text("a question\nanother\n")
    path = f"{tmp_path / 'texts'}:train"
    assert read_prompts(path, "text").height == 2
    assert "no column 'prompt'; its columns are text" in refused(path)


def test_images_are_refused_and_not_opened(tmp_path: Path) -> None:
    features = datasets.Features({"prompt": datasets.Value("string"), "image": datasets.Image()})
    rows = {"prompt": ["a"], "image": [{"bytes": b"no image", "path": None}]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "seen")
    assert "'image' cannot be used, only text" in refused(tmp_path / "seen")


@pytest.mark.parametrize("spec", ["", ":train", ":train[:10]", "@v1:config:train", "[:10]"])
def test_the_hub_out_of_reach(spec: str) -> None:
    said = refused(f"an-owner/a-dataset{spec}")
    assert said.startswith("an-owner/a-dataset is no local file or folder, and as a data set of the hub it cannot be ")
    for remedy in (
        "check the spelling (owner/name)",
        "hf auth login",
        "HF_HUB_OFFLINE=1",
        "name a local file or folder",
    ):
        assert remedy in said


def test_the_hub(cloned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(cloned, {None: "c0ffee", "v1": "beef"}, monkeypatch)
    name = "an-owner/a-dataset:train_prefs[:2]"
    log = Notes()
    source = find_source(name, log)
    assert source.digest() == f"{name} at c0ffee"
    assert read(source) == [
        ("train_prefs 0", "a-dataset:train_prefs, row 0"),
        ("train_prefs 1", "a-dataset:train_prefs, row 1"),
    ]  # type: ignore[arg-type]
    assert log.texts == ["an-owner/a-dataset: reading the data set of the Hugging Face hub at c0ffee"]
    assert hub.asked == [("an-owner/a-dataset", None, None)]
    assert commit_of(source.digest(), name) == "c0ffee"
    assert commit_of(source.digest(), "an-owner/a-dataset:train_prefs[:3]") is None
    assert commit_of("04dd46a382f85279e21be8fa", name) is None
    assert find_source("an-owner/a-dataset@v1:default:test_prefs").digest().endswith(" at beef")
    assert find_source(name, commit="cafe").digest() == f"{name} at cafe"
    assert hub.asked[1:] == [("an-owner/a-dataset", "default", "v1"), ("an-owner/a-dataset", None, "cafe")]
    assert "several splits, which are not read as one (test_prefs, train_prefs)" in refused("an-owner/a-dataset")


def test_the_cache_of_the_hub(cloned: Path) -> None:
    """What datasets does itself without a network: it takes the cached data set, whose commit is known."""
    prepared = datasets.load_dataset_builder(str(cloned.rename(cloned.parent / "a-dataset")))
    prepared.download_and_prepare()
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    shutil.copytree(prepared.cache_dir, cache / "an-owner___a-dataset" / "default" / "0.0.0" / "c0ffee")
    name = "an-owner/a-dataset:train_prefs[:2]"
    assert [prompt for prompt, _ in read(name)] == ["train_prefs 0", "train_prefs 1"]
    assert find_source(name).digest() == find_source(name, commit="c0ffee").digest() == f"{name} at c0ffee"
    assert len(read("an-owner/a-dataset@c0ffee:default:test_prefs")) == 4
    for source in (find_source(name, commit="beef"), find_source("an-owner/a-dataset@v2:train_prefs")):
        with pytest.raises(
            DataError, match=r"the cache has commit c0ffee, which may not be (beef|v2); check the spelling"
        ):
            list(source.rows())


def test_a_folder_named_as_a_format(cloned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(cloned.parent)
    cloned.rename("csv")
    assert read("csv:test_prefs[:1]") == [("test_prefs 0", "csv:test_prefs, row 0")]
    assert "has several splits" in refused("csv")


HUB_CALLS = """
import sys
from dice_py.data import read_prompts
from dice_py.errors import DataError
from dice_py.rows.sources import find_source

for name in sys.argv[1:]:
    try:
        print(find_source(name).digest(), "|", *read_prompts(name)["where"])
    except DataError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_server_that_speaks_as_the_hub(cloned: Path, tmp_path: Path) -> None:
    """The whole way over HTTP: revision to commit, listing, download, and then the cache alone."""

    def call(*names: str, offline: int = 0) -> list[str]:
        env = {
            "HF_HOME": str(tmp_path / "home"),
            "HF_ENDPOINT": address,
            "HF_HUB_OFFLINE": str(offline),
            "NO_PROXY": "*",
        }
        done = subprocess.run(
            [sys.executable, "-c", HUB_CALLS, *names],
            env={**os.environ, **env}, cwd=ROOT, check=True, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        return done.stdout.splitlines()

    read = "set:train_prefs, row 0 set:train_prefs, row 1"
    with serve_hub(cloned, {"main": "a" * 40, "v1": "b" * 40}) as (address, asked):
        no_split, several, absent = call("own/set:dev", "own/set", "own/none:train")
        assert no_split == "own/set:dev: there is no split 'dev'; its splits are test_prefs, train_prefs"
        assert several.endswith("(test_prefs, train_prefs): name one, as own/set:test_prefs")
        assert "Dataset 'own/none' doesn't exist on the Hub or cannot be accessed." in absent
        assert not any(request.startswith("GET") and request.endswith(".jsonl") for request in asked)
        assert call("own/set@v1:train_prefs[:2]", "own/set:train_prefs[:2]") == [
            f"own/set@v1:train_prefs[:2] at {'b' * 40} | {read}",
            f"own/set:train_prefs[:2] at {'a' * 40} | {read}",
        ]
        assert any(request.startswith("GET") and request.endswith(".jsonl") for request in asked)
    assert call("own/set:train_prefs[:2]", offline=1)[0].endswith(f" | {read}")


def test_without_the_package(cloned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for written in (f"{cloned}:train_prefs", cloned, "an-owner/a-dataset"):
        with pytest.raises(UsageError, match=r"package datasets; add it with: pip install 'dice-align\[train\]'"):
            read_prompts(written)
    file = cloned / "data" / "train_prefs-00000-of-00001.jsonl"
    assert len(read(file)) == len(read(cloned / "data" / "train*")) == 10


def test_a_parquet_split_keeps_what_parquet_does(tmp_path: Path) -> None:
    """The fields of other rows' messages, which Arrow fills with null, are none."""
    rows = [[{"role": "user", "content": "a", "name": "x"}], [{"role": "user", "content": "b", "name": None}]]
    (tmp_path / "set").mkdir()
    pl.DataFrame({"prompt": rows}).write_parquet(tmp_path / "set" / "train.parquet")
    assert (
        read_prompts(f"{tmp_path / 'set'}:train")["messages"].to_list()
        == read_prompts(tmp_path / "set" / "train.parquet")["messages"].to_list()
    )
