"""Digests in files and stamps of folders: every flipped bit is noticed, and what is damaged is set aside."""

from __future__ import annotations

import random
from pathlib import Path

import polars as pl
import pytest
from damage import empty, flip, truncate

from dice_py.errors import DamagedError
from dice_py.storage.digests import content_digest, embed_digest, file_state, stored_digest
from dice_py.storage.files import read_sealed, write_json, write_sealed, write_sealed_text
from dice_py.storage.integrity import (
    MODEL_STAMP,
    check_intact,
    damaged_in,
    is_kept,
    read_stamp,
    set_aside,
    write_stamp,
)
from dice_py.storage.parquet import ParquetStream, intact_key, parquet_key, parquet_meta, write_parquet

FRAME = pl.DataFrame({"row": range(500), "text": [f"answer {number}" for number in range(500)]})


def ignore(event: str, **fields: object) -> None:
    """A report that nobody reads."""


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_parquet(tmp_path / "shard.parquet", FRAME, key="k", meta={"a": 1})


def test_a_file_carries_the_digest_of_its_bytes(shard: Path) -> None:
    assert file_state(shard) == "intact"
    assert intact_key(shard) == parquet_key(shard) == "k"
    assert parquet_meta(shard) == {"a": 1}
    digest = stored_digest(shard)
    assert digest is not None
    # It is that of the bytes with zeros in its place.
    data = shard.read_bytes()
    shard.write_bytes(data.replace(digest.encode(), b"0" * 32))
    assert content_digest(shard) == digest


def test_equal_content_makes_equal_files(shard: Path, tmp_path: Path) -> None:
    again = write_parquet(tmp_path / "again.parquet", FRAME, key="k", meta={"a": 1})
    assert again.read_bytes() == shard.read_bytes()


def test_no_flipped_bit_is_kept(shard: Path) -> None:
    data = shard.read_bytes()
    rng = random.Random(0)
    footer = len(data) - 600  # each bit of the footer's end, with key, metadata and digest, and many of the rest
    bits = [*range(8 * footer, 8 * len(data), 3), *(rng.randrange(8 * footer) for _ in range(300))]
    for bit in bits:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << (bit % 8)
        shard.write_bytes(flipped)
        assert not is_kept(shard, "k", ignore), bit
        for aside in shard.parent.glob("*.damaged"):
            aside.unlink()


@pytest.mark.parametrize("change", [truncate, empty, lambda path: path.write_bytes(path.read_bytes() + b"x")])
def test_other_damage(shard: Path, change) -> None:
    change(shard)
    notes: list[str] = []
    assert not is_kept(shard, "k", lambda event, **fields: notes.append(fields["text"]))
    assert [path.name for path in shard.parent.iterdir()] == ["shard.parquet.damaged"]
    assert notes == [
        f"{shard} is damaged: not as it was written. It is set aside as shard.parquet.damaged and made again"
    ]


def test_an_outdated_file_is_not_damaged(shard: Path) -> None:
    assert not is_kept(shard, "another", ignore)
    FRAME.write_parquet(shard)  # of an older version, say, or of the user's own
    assert file_state(shard) == "unmarked"
    assert not is_kept(shard, "k", ignore)


def test_a_file_in_parts(tmp_path: Path) -> None:
    path = tmp_path / "parts.parquet"
    with ParquetStream(path) as stream:
        stream.write(FRAME[:100])
        stream.write(FRAME[100:])
        stream.describe("k", None)
    assert intact_key(path) == "k"
    assert pl.read_parquet(path).equals(FRAME)
    with ParquetStream(path) as stream:
        stream.write(FRAME)
    assert file_state(path) == "unmarked"


def test_many_columns_leave_room_for_the_digest(tmp_path: Path) -> None:
    frame = pl.DataFrame({f"column number {number}": [number] for number in range(3000)})
    assert intact_key(write_parquet(tmp_path / "wide.parquet", frame, key="k", meta=["x"] * 10000)) == "k"


def test_json_and_text(tmp_path: Path) -> None:
    write_sealed(tmp_path / "a.json", {"dice": [1, "é"]}, "k")
    assert read_sealed(tmp_path / "a.json", "k") == read_sealed(tmp_path / "a.json") == {"dice": [1, "é"]}
    assert read_sealed(tmp_path / "a.json", "other") is None
    assert read_sealed(tmp_path / "none.json") is None
    write_sealed_text(tmp_path / "a.yaml", "a: 1\n", "# {}")
    for name in ("a.json", "a.yaml"):
        data = (tmp_path / name).read_bytes()
        for bit in range(8 * len(data)):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << (bit % 8)
            (tmp_path / name).write_bytes(flipped)
            assert file_state(tmp_path / name) != "intact", bit
            assert read_sealed(tmp_path / name) is None
    write_json(tmp_path / "plain.json", {"a": 1})
    assert read_sealed(tmp_path / "plain.json") is None
    with pytest.raises(ValueError, match="no place for a digest"):
        embed_digest(tmp_path / "plain.json")


def test_a_second_damaged_file_has_another_name(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / "file").write_text(str(number))
        set_aside(tmp_path / "file", ignore)
    names = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert names == {"file.damaged": "0", "file.damaged-2": "1", "file.damaged-3": "2"}


# --- folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    (made / "below").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "below/part"):
        (made / name).write_text(f"content of {name}")
    (made / ".hidden").write_text("x")
    write_stamp(made, {"key": "k", "counts": {"steps": 3}})
    return made


def test_a_stamp_lists_all_files(folder: Path) -> None:
    stamp = read_stamp(folder)
    assert stamp is not None
    assert list(stamp) == ["key", "counts", "files"]
    assert stamp["files"] == {
        name: content_digest(folder / name) for name in ("below/part", "config.json", "model.safetensors")
    }
    assert damaged_in(folder) == []
    (folder / "readme.txt").write_text("of the user")  # no part of it
    assert damaged_in(folder) == []
    check_intact([folder, None])


@pytest.mark.parametrize("change", [flip, truncate, empty, Path.unlink])
@pytest.mark.parametrize("name", ["below/part", "config.json", "model.safetensors", "dice.json"])
def test_a_damaged_file_of_a_folder_is_named(folder: Path, name: str, change) -> None:
    change(folder / name)
    assert damaged_in(folder) == [folder / name]
    if (folder / "dice.json").exists():
        with pytest.raises(DamagedError, match=f"{name} is damaged") as caught:
            check_intact([folder])
        assert caught.value.exit_code == 3


def test_what_a_stage_reads_is_checked(shard: Path, tmp_path: Path) -> None:
    FRAME.write_parquet(tmp_path / "own.parquet")  # a user's file, which has no digest
    check_intact([shard, tmp_path / "own.parquet", tmp_path / "absent.parquet"])
    flip(shard)
    with pytest.raises(DamagedError, match=r"shard\.parquet is damaged"):
        check_intact([tmp_path / "own.parquet", shard])


@pytest.mark.parametrize("files", [None, ["model.safetensors"], {"model.safetensors": None}])
def test_a_stamp_of_other_types_is_none(folder: Path, files: object) -> None:
    write_sealed(folder / MODEL_STAMP, {"key": "k", "files": files}, "k")
    assert read_stamp(folder) is None
    assert damaged_in(folder) == [folder / MODEL_STAMP]
