"""What a user writes where data is named: files, folders, patterns, slices, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from datasets import ReadInstruction
from hypothesis import given, settings
from hypothesis import strategies as st
from notes import Notes
from property_examples import examples

from dice_py.data import read_pairs, read_prompts
from dice_py.errors import DataError
from dice_py.rows.slices import bounds
from dice_py.rows.sources import find_source, is_there
from dice_py.storage.keys import file_digest


def jsonl(path: Path, *prompts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return path


def read(written: Path | str) -> list[tuple[str, str]]:
    """(prompt, place) of every row."""
    prompts = read_prompts(written)
    return [(turns[0]["content"], where) for turns, where in prompts.select("messages", "where").iter_rows()]


def refused(written: Path | str) -> str:
    with pytest.raises(DataError) as error:
        read_prompts(written)
    return str(error.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of several kinds, hidden ones, and some that hold no rows."""
    folder = tmp_path / "mine"
    jsonl(folder / "b.jsonl", "b0", "b1")
    jsonl(folder / "a" / "z.ndjson", "z0")
    (folder / "a.csv").write_text("prompt\nc0\n")
    (folder / "notes.txt").write_text("no rows")
    (folder / "dataset_infos.json").write_text("{}")
    jsonl(folder / ".cache" / "hidden.jsonl", "h")
    jsonl(folder / ".hidden.jsonl", "h")
    return folder


def test_a_folder_is_all_its_files_in_order(folder: Path) -> None:
    assert read(folder) == [
        ("c0", "a.csv, line 2"),
        ("z0", "a/z.ndjson, line 1"),
        ("b0", "b.jsonl, line 1"),
        ("b1", "b.jsonl, line 2"),
    ]
    log = Notes()
    find_source(folder, log)
    assert log.texts == [f"{folder}: 3 files, {folder / 'a.csv'} … {folder / 'b.jsonl'}"]
    (folder / "b.jsonl").write_text('{"prompt": "b0"}\n{\n')
    assert refused(folder).startswith(f"{folder / 'b.jsonl'}, line 2: not valid JSON")


def test_a_pattern(folder: Path) -> None:
    assert read(folder / "*.jsonl") == [("b0", "b.jsonl, line 1"), ("b1", "b.jsonl, line 2")]
    assert [prompt for prompt, _ in read(folder / "**" / "*.*[nv]")] == ["c0", "z0"]
    assert [prompt for prompt, _ in read(f"{folder}/**/*[:2]")] == ["c0", "z0"]
    assert "no file of .jsonl, .json, .parquet, .csv or .tsv has a name of this pattern" in refused(folder / "*.txt")


def test_the_content_of_several_files_is_that_of_all_in_order(folder: Path) -> None:
    one = folder / "b.jsonl"
    assert find_source(one).digest() == find_source(folder / "b*.jsonl").digest() == file_digest(one)
    before = find_source(folder).digest()
    assert find_source(folder / "**" / "*").digest() == before
    (folder / "notes.txt").write_text("changed")
    assert find_source(folder).digest() == before
    (folder / "b.jsonl").rename(folder / "0.jsonl")
    renamed = find_source(folder).digest()
    jsonl(folder / "a.jsonl", "new")
    digests = {before, renamed, find_source(folder).digest(), find_source(f"{folder}[:1]").digest()}
    assert len(digests | {find_source(f"{folder}[:2]").digest()}) == 5


def test_slices_of_files(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", *(f"q{n}" for n in range(10)))
    for written, expected in (
        (f"{path}[:2]", [0, 1]),
        (f"{path}:[:2]", [0, 1]),
        (f"{path}[8:]", [8, 9]),
        (f"{path}[-2:]", [8, 9]),
        (f"{path}[10%:30%]", [1, 2]),
        (f"{path}[3:4]", [3]),
    ):
        assert read(written) == [(f"q{n}", f"p.jsonl, line {n + 1}") for n in expected]
    assert "holds no prompts" in refused(f"{path}[5:2]")
    for bad in ("[a:b]", "[1:2:3]", "[%:]", "[:101%]"):
        assert "slice" in refused(f"{path}{bad}")
    assert f"{path} is a file, which has no splits; a part of it is written {path}[:1000]" in refused(f"{path}:train")


def test_a_slice_reads_no_further_than_it_must(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": ""}\n')
    assert len(read(f"{path}[:2]")) == 2
    assert "line 3: 'prompt' is an empty text" in refused(path)


ENDS = st.none() | st.integers(-130, 130)


@settings(max_examples=examples(200), deadline=None)
@given(total=st.integers(1, 120), start=ENDS, stop=ENDS, percent=st.booleans())
def test_slices_are_those_of_datasets(total: int, start: int | None, stop: int | None, percent: bool) -> None:
    sign = "%" if percent else ""
    ends = ["" if end is None else f"{max(min(end, 100), -100) if percent else end}{sign}" for end in (start, stop)]
    text = f"[{ends[0]}:{ends[1]}]"
    (read,) = ReadInstruction.from_spec(f"train{text}").to_absolute({"train": total})
    first, last = bounds(text, total)
    assert range(first, last) == range(min(read.from_, total), min(read.to, total))


def test_a_path_that_exists_is_meant_before_anything_else(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    log = Notes()
    assert len(read_prompts("mine/a", report=log)) == 1
    assert log.texts[0] == "mine/a: the local folder mine/a, and not a data set of the hub"
    for odd in ("p[:1].jsonl", "part[0-9].jsonl", "a:train.jsonl", "b*.jsonl"):
        jsonl(tmp_path / odd, "one", "two")
        assert [prompt for prompt, _ in read(odd)] == ["one", "two"]
    assert is_there("mine/a")
    assert is_there("mine/*.csv")
    assert is_there("p[:1].jsonl[:1]")
    assert not is_there("other/a:train")
    assert not is_there("mine/*.none")
    log = Notes()
    assert read_prompts("p[:1].jsonl[:1]", report=log).height == 1
    assert log.texts == []


def test_a_folder_with_several_splits_is_refused(tmp_path: Path) -> None:
    """Test data would become training data without a word."""
    for names in (("train.jsonl", "test.jsonl"), ("train/a.jsonl", "validation/a.jsonl")):
        folder = tmp_path / names[1].replace("/", "-")
        for name in names:
            jsonl(folder / name, name)
        assert f"{folder} has several splits, which are not read as one (train, " in refused(folder)
        assert f"name one, as {folder}:train" in refused(folder)
        assert refused(f"{folder}[:1]") == refused(folder)
    shards = tmp_path / "shards"
    for split in ("train_prefs", "test_prefs"):
        jsonl(shards / "data" / f"{split}-00000-of-00001.jsonl", split)
    assert "(test_prefs, train_prefs): name one" in refused(shards)
    mixed = tmp_path / "mixed"  # of which datasets itself would read one kind alone
    jsonl(mixed / "train.jsonl", "a")
    (mixed / "test.csv").write_text("prompt\nb\n")
    assert "has several splits, which are not read as one (train, test)" in refused(mixed)
    (mixed / "test.csv").rename(mixed / "test.txt")
    assert read(mixed) == [("a", "train.jsonl, line 1")]
    # One split alone is no choice, whatever its name is.
    assert read(jsonl(tmp_path / "only" / "test.jsonl", "a").parent) == [("a", "test.jsonl, line 1")]


def test_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a config names it, which no shell expands."""
    monkeypatch.setenv("HOME", str(folder.parent))
    assert read("~/mine/b.jsonl[:1]") == read(f"{folder}/b.jsonl[:1]")
    assert read("~/mine/b*.jsonl") == read(f"{folder}/b*.jsonl")
    assert len(read("~/mine")) == 4


def test_a_folder_without_data(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("a")
    assert refused(tmp_path) == f"{tmp_path} is a folder without a file of .jsonl, .json, .parquet, .csv or .tsv"


def test_pipes_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    assert "is a pipe or a device, not a regular file" in refused(tmp_path / "rows.jsonl")


def test_large_files_are_read_in_parts(tmp_path: Path) -> None:
    """Peak memory of reading stays far below the file's size once it is unpacked."""
    import gzip
    import tracemalloc

    line = json.dumps({"prompt": "a" * 1000}).encode() + b"\n"
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(line * 30_000))
    import polars as pl

    pl.DataFrame({"prompt": ["a" * 1000] * 30_000}).write_parquet(tmp_path / "p.parquet", row_group_size=5000)
    for name in ("p.jsonl.gz", "p.parquet"):
        tracemalloc.start()
        try:
            assert sum(1 for _ in find_source(tmp_path / name).rows()) == 30_000
            assert tracemalloc.get_traced_memory()[1] < 15e6
        finally:
            tracemalloc.stop()


def test_pairs_of_a_folder_name_its_files(tmp_path: Path) -> None:
    for name in ("a/x.jsonl", "b/x.jsonl"):
        file = tmp_path / name
        file.parent.mkdir()
        file.write_text(json.dumps({"prompt": name, "chosen": "1", "rejected": "2"}) + "\n")
    where = ["a/x.jsonl, line 1", "b/x.jsonl, line 1"]
    assert read_pairs(tmp_path)["where"].to_list() == read_pairs(tmp_path / "*" / "x.jsonl")["where"].to_list() == where


def test_rows_are_read_anew_each_time(folder: Path) -> None:
    source: Any = find_source(folder)
    assert len(list(source.rows())) == len(list(source.rows())) == 4
    assert find_source(source) is source
    assert str(source) == str(folder)
