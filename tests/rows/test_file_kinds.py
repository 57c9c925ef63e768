"""Files and paths of other kinds than are read, each with what to do; and times that Python cannot hold."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.feather as pf
import pyarrow.parquet as pq
import pytest

from dice_py.data import read_pairs, read_prompts
from dice_py.errors import DataError
from dice_py.mining.files import mine_files

ROWS = "".join(json.dumps({"prompt": f"question {n}", "chosen": "a", "rejected": "b"}) + "\n" for n in range(3))


def parquet(path: Path) -> bytes:
    pl.DataFrame({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}).write_parquet(path)
    return path.read_bytes()


def refused(path: Path) -> str:
    with pytest.raises(DataError) as error:
        read_prompts(path)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", gzip.compress(ROWS.encode(), mtime=0), "is compressed by gzip; unpack it first (gunzip)"),
        ("a.jsonl.gz", gzip.compress(ROWS.encode(), mtime=0), "is compressed by gzip; unpack it first (gunzip)"),
        ("a.jsonl.bz2", bz2.compress(ROWS.encode()), "is compressed by bzip2"),
        ("a.json.xz", lzma.compress(ROWS.encode()), "is compressed by xz"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd" + bytes(9), "is compressed by zstd"),
        ("a.zip", b"PK\x03\x04" + bytes(9), "is a ZIP archive"),
        ("a.jsonl", ROWS.encode("utf-16"), "is UTF-16 text; convert it to UTF-8 (iconv"),
        ("a.jsonl", ROWS.encode("utf-32"), "is UTF-32 text; convert it to UTF-8 (iconv"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "with: git lfs pull"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "with: git lfs pull"),
        ("a.jsonl", b"<!DOCTYPE html>\n<html></html>", "is a web page (of a download that failed?)"),
        ("a.parquet", ROWS.encode(), "holds JSON; rename it to a.jsonl"),
        ("a.csv", b"prompt\na\n", "pl.read_csv(…).write_parquet(…)"),
        ("a.tsv", b"prompt\tb\na\tb\n", 'pl.read_csv(…, separator="\\t").write_parquet(…)'),
        ("a.txt", b"a question\n", 'write each text as a line {"prompt": "…"} of a .jsonl file'),
        ("rows", ROWS.encode(), "unknown file type ''; use .jsonl, .json or .parquet"),
    ],
)
def test_other_files_have_a_remedy(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert words in refused(tmp_path / name)
    assert "line 1" not in refused(tmp_path / name)


def test_a_parquet_file_of_another_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(parquet(tmp_path / "b.parquet"))
    assert "is a Parquet file; rename it to a.parquet" in refused(tmp_path / "a.jsonl")


def test_an_arrow_file(tmp_path: Path) -> None:
    pf.write_feather(pa.table({"prompt": ["a"]}), str(tmp_path / "a.arrow"))
    assert "is an Arrow file; write it as Parquet" in refused(tmp_path / "a.arrow")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("https://example.org/rows.jsonl", "looks like a URL: get the file first"),
        ("data/*.jsonl", "patterns are not read here: give one file"),
        ("an-owner/a-dataset", "Dataset.to_parquet of the package datasets"),
    ],
)
def test_what_is_no_file(path: str, words: str) -> None:
    assert words in refused(Path(path))


def test_a_saved_data_set_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{}")
    assert "is a folder; give one file" in refused(tmp_path)
    assert "Dataset.to_parquet" in refused(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "far"),
    [
        (pa.timestamp("us"), 2**62),
        (pa.timestamp("ms", "Asia/Tokyo"), 2**52),
        (pa.timestamp("s"), 2**52),
        (pa.duration("ms"), 2**62),
        (pa.date32(), 2**31 - 1),
    ],
    ids=str,
)
def test_times_that_python_cannot_hold_are_not_read(dtype: pa.DataType, far: int, tmp_path: Path) -> None:
    """Such a column is of no meaning here: it must not end the reading."""
    times = pa.array([far, 5, None], pa.int32() if dtype == pa.date32() else pa.int64()).cast(dtype)
    table = pa.table({"prompt": list("abc"), "chosen": list("def"), "rejected": list("ghi"), "at": times})
    pq.write_table(table, tmp_path / "a.parquet")
    assert read_pairs(tmp_path / "a.parquet").height == 3
    inside = table.drop_columns("at").append_column("meta", pa.StructArray.from_arrays([times], ["at"]))
    pq.write_table(inside, tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet cannot be read: a time inside of a column"):
        read_pairs(tmp_path / "b.parquet")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"prompt_id\n1\n", "dice mine reads Parquet: convert it"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "with: git lfs pull"),
        ("a.parquet.gz", gzip.compress(b"x", mtime=0), "is compressed by gzip"),
        ("a.jsonl", ROWS.encode(), "dice mine reads Parquet: convert it"),
    ],
)
def test_mining_other_files(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        mine_files([str(tmp_path / name)], tmp_path / "out.parquet")
    assert words in str(error.value)


def test_mining_a_url() -> None:
    with pytest.raises(DataError, match="only local files are read: get it first"):
        mine_files(["s3://bucket/scored.parquet"], Path("out.parquet"))


@pytest.mark.parametrize("memory", [1.0, 1e-6])
@pytest.mark.parametrize("name", ["*", "^re.*$", ""])
def test_names_that_polars_takes_for_patterns(name: str, memory: float, tmp_path: Path) -> None:
    """Other columns would be mined in the place of these, or a traceback come of it."""
    table = pa.table({"prompt_id": [1, 1], name: [0.5, 0.25], "response_tokens": [3, 4], "reward": [9, 8]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"cannot be read: rename the column|not found"):
        mine_files([str(tmp_path / "a.parquet")], tmp_path / "o.parquet", memory_gib=memory, reward_column=name)
