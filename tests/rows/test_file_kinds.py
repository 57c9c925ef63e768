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
        ("a.jsonl.gz", gzip.compress(gzip.compress(ROWS.encode(), mtime=0), mtime=0), "is compressed by gzip; unpack"),
        ("a.jsonl.gz", gzip.compress(ROWS.encode("utf-16"), mtime=0), "is UTF-16 text; convert it to UTF-8 (iconv"),
        ("a.tar.gz", gzip.compress(ROWS.encode(), mtime=0), "unknown file type '.tar'; use"),
        ("a.zip", b"PK\x03\x04" + bytes(9), "is a ZIP archive"),
        ("a.jsonl", ROWS.encode("utf-16"), "is UTF-16 text; convert it to UTF-8 (iconv"),
        ("a.jsonl", ROWS.encode("utf-32"), "is UTF-32 text; convert it to UTF-8 (iconv"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "with: git lfs pull"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "with: git lfs pull"),
        ("a.jsonl", b"<!DOCTYPE html>\n<html></html>", "is a web page (of a download that failed?)"),
        ("a.parquet", ROWS.encode(), "holds JSON; rename it to a.jsonl"),
        ("a.txt", b"a question\n", 'write each text as a line {"prompt": "…"} of a .jsonl file'),
        ("rows", ROWS.encode(), "unknown file type ''; use .jsonl, .json, .parquet, .csv or .tsv"),
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
        ("data/*.jsonl", "no file of .jsonl, .json, .parquet, .csv or .tsv has a name of this pattern"),
        ("absent/rows.jsonl", "does not exist (or is not a file)"),
    ],
)
def test_what_is_no_file(path: str, words: str) -> None:
    assert words in refused(Path(path))


def packed(kind: str, data: bytes, path: Path) -> bytes:
    if kind == "zst":
        with pa.output_stream(str(path), compression="zstd") as file:
            file.write(data)
        return path.read_bytes()
    return {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[kind](data)


@pytest.mark.parametrize("kind", ["gz", "zst", "bz2", "xz"])
def test_compressed_files(kind: str, tmp_path: Path) -> None:
    other = tmp_path / "scratch"
    for name, data in (
        ("a.jsonl", ROWS.encode()),
        ("a.json", json.dumps([json.loads(line) for line in ROWS.splitlines()]).encode()),
        ("a.csv", b"prompt\nquestion 0\nquestion 1\nquestion 2\n"),
    ):
        # By content: the name may have lost the ending, or have it though a download unpacked the file.
        for path, content in (
            (tmp_path / f"{name}.{kind}", packed(kind, data, other)),
            (tmp_path / name, packed(kind, data, other)),
            (tmp_path / f"plain-{name}.{kind}", data),
        ):
            path.write_bytes(content)
            assert [m[0]["content"] for m in read_prompts(path)["messages"].to_list()] == [
                f"question {n}" for n in range(3)
            ]
    path = tmp_path / f"a.jsonl.{kind}"
    assert read_prompts(path)["where"][2] == f"a.jsonl.{kind}, line 3"
    path.write_bytes(packed(kind, b"", other))
    assert f"{path} is empty" in refused(path)
    path.write_bytes(packed(kind, parquet(tmp_path / "b.parquet"), other))
    assert "is a compressed Parquet file; unpack it first" in refused(path)
    path.write_bytes(packed(kind, ROWS.encode() * 1000, other)[:-20])  # a copy that was cut off
    assert f"{path} cannot be unpacked by " in refused(path)
    assert "it is damaged or cut off; get it again" in refused(path)


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
