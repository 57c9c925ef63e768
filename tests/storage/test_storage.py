"""Files between stages: a file under its final name is complete, whatever happened while it was written."""

from __future__ import annotations

import errno
import json
import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest
from small_disk import small_disk

from dice_py.errors import DataError, DiskFullError, UsageError
from dice_py.storage.files import (
    TEMPORARY,
    Manifest,
    atomic,
    is_disk_full,
    path_error,
    read_json,
    remove_temporaries,
    write_json,
    write_text,
)
from dice_py.storage.keys import digest, file_digest, seed_for, versions
from dice_py.storage.parquet import parquet_key, parquet_meta, parquet_rows, read_parquet, write_parquet
from dice_py.storage.schemas import MINED, PAIRS, PROMPTS, TRAINING_SET

NO_ROOM = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder: Path) -> list[str]:
    """All names in a folder, the hidden ones too."""
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk") as folder:
        yield folder


# --- atomic writes -----------------------------------------------------------------------------------------


def test_a_file_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.txt"
    with atomic(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        assert temporary.parent == path.parent  # the same file system, or it could not be renamed
    assert path.read_text() == "half"
    assert names(path.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt(), NO_ROOM])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises((type(error), DiskFullError)):  # noqa: PT012, SIM117
        with atomic(path) as temporary:
            temporary.write_text("new")
            raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("error", [ValueError("a bug"), NO_ROOM])
def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "model"
    with atomic(path) as temporary:
        (temporary / "deep").mkdir(parents=True)
        (temporary / "deep" / "weights").write_text("old")
    with pytest.raises((type(error), DiskFullError)):  # noqa: PT012, SIM117
        with atomic(path) as temporary:
            temporary.mkdir()
            (temporary / "weights").write_text("new")
            raise error
    assert (path / "deep" / "weights").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_a_folder_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "model"
    for text in ("old", "new"):
        with atomic(path) as temporary:
            temporary.mkdir()
            (temporary / text).write_text(text)
    assert names(path) == ["new"]
    assert names(tmp_path) == ["model"]


def test_all_is_synced_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model"
    synced: list[str] = []

    def fsync(handle: int) -> None:
        synced.append(Path(f"/proc/self/fd/{handle}").readlink().name + ("" if path.exists() else ", before"))

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic(path) as temporary:
        (temporary / "deep").mkdir(parents=True)
        (temporary / "deep" / "weights").write_text("x")
    assert sorted(synced[:3]) == sorted(["weights, before", "deep, before", f"{temporary.name}, before"])
    assert synced[3:] == [tmp_path.name]  # the rename itself


def test_no_room_when_the_disk_says_so_at_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A file system with delayed allocation reports it only at fsync.
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def fsync(handle: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(DiskFullError):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_no_room_is_a_error_shown_and_exit_code_5(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    with pytest.raises(DiskFullError) as caught, atomic(path):
        raise NO_ROOM
    assert caught.value.exit_code == 5
    assert str(caught.value).startswith(f"no room left on the disk while writing {path}; completed files are kept")
    assert "dice resume" in str(caught.value)


def test_a_really_full_disk(tiny_disk: Path) -> None:
    frame = pl.DataFrame({"x": [str(i * 7919 % 10007) * 20 for i in range(200)]})
    table, text, folder = tiny_disk / "table.parquet", tiny_disk / "text.json", tiny_disk / "model"
    write_parquet(table, frame, key="old")
    write_text(text, "old")
    with atomic(folder) as temporary:
        temporary.mkdir()
        (temporary / "weights").write_text("old")
    before = names(tiny_disk)
    big = pl.DataFrame({"x": [os.urandom(64).hex() for _ in range(4000)]})
    with pytest.raises(DiskFullError):
        write_parquet(table, big, key="new")
    with pytest.raises(DiskFullError):
        write_text(text, "new" * 100_000)
    with pytest.raises(DiskFullError):  # noqa: PT012, SIM117
        with atomic(folder) as temporary:
            temporary.mkdir()
            (temporary / "weights").write_bytes(os.urandom(100_000))
    assert names(tiny_disk) == before
    assert parquet_key(table) == "old"
    assert read_parquet(table).equals(frame)
    assert text.read_text() == "old"
    assert (folder / "weights").read_text() == "old"
    write_text(text, "there is room again")  # since nothing was left behind


def test_no_room_is_recognized_through_other_errors() -> None:
    assert is_disk_full(OSError(errno.ENOSPC, "full"))
    assert is_disk_full(OSError(errno.EDQUOT, "quota"))
    assert is_disk_full(OSError(errno.EFBIG, "ulimit -f"))
    assert is_disk_full(RuntimeError("I/O error: File too large (os error 27)"))
    # From safetensors, which is written in Rust: no errno.
    assert is_disk_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    # From torch.save, whose writer only says how far it came.
    assert is_disk_full(RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"))
    assert not is_disk_full(RuntimeError("PytorchStreamReader failed reading zip archive: failed finding directory"))
    outer = RuntimeError("could not save")
    outer.__cause__ = NO_ROOM
    assert is_disk_full(outer)
    assert not is_disk_full(OSError(errno.EACCES, "denied"))
    assert not is_disk_full(RuntimeError("out of memory"))
    assert not is_disk_full(None)


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(DiskFullError, match=r"a file may not grow so large here .* while writing .*/a.json"):
            write_text(tmp_path / "a.json", "x" * 2000)
        with pytest.raises(DiskFullError, match="a file may not grow so large here"):
            write_parquet(tmp_path / "a.parquet", pl.DataFrame({"x": [os.urandom(2000).hex()]}), key="k")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []


def test_paths_that_the_user_can_fix(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=rf"{tmp_path}/folder is a folder, where a file belongs: move it away"):
        write_text(tmp_path / "folder", "y")
    with pytest.raises(OSError, match="File exists") as caught:
        write_text(tmp_path / "file" / "below", "y")
    error_shown = path_error(caught.value)
    assert isinstance(error_shown, UsageError)
    assert "File exists" in str(error_shown)
    assert str(tmp_path) in str(error_shown)
    assert names(tmp_path) == ["file", "folder"]
    assert isinstance(path_error(NO_ROOM), DiskFullError)
    assert str(path_error(OSError(errno.EIO, "broken"))).startswith("broken: a disk or a network folder fails")
    assert path_error(OSError(errno.EINVAL, "broken", "place")) is None
    assert path_error(OSError("a library's own")) is None


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "whole.txt", "x")
    with atomic(tmp_path / "deep" / "model") as temporary:
        temporary.mkdir()
        left = tmp_path / "deep" / temporary.name.replace(str(os.getpid()), "1")
        left.mkdir()
        (left / "weights").write_text("half")
    left.with_name(".whole.txt.1.tmp").write_text("half")
    remove_temporaries(tmp_path)
    assert names(tmp_path / "deep") == ["model", "whole.txt"]


# --- Parquet and JSON --------------------------------------------------------------------------------------


def test_parquet_carries_key_and_meta(tmp_path: Path) -> None:
    path = tmp_path / "prompts.parquet"
    frame = pl.DataFrame({"messages": [[{"role": "user", "content": "hi"}]], "more": [1], "prompt_id": [0]})
    assert write_parquet(path, frame, key="abc", schema=PROMPTS, meta={"n": [1, None]}) == path
    assert parquet_key(path) == "abc"
    assert parquet_meta(path) == {"n": [1, None]}
    assert parquet_rows(path) == 1
    frame_read = read_parquet(path)
    assert frame_read.schema == PROMPTS  # cast, in order, and nothing more
    assert frame_read.rows() == [(0, [{"role": "user", "content": "hi"}])]
    assert read_parquet(path, ["messages"]).columns == ["messages"]
    # Plain types for readers of any kind, not Polars' large ones.
    assert str(pq.read_schema(path).field("messages").type).startswith("list<")
    write_parquet(path, frame, key="def")
    assert parquet_meta(path) is None


@pytest.mark.parametrize("schema", [PROMPTS, MINED, PAIRS, TRAINING_SET])
def test_empty_tables_keep_their_types(tmp_path: Path, schema: pl.Schema) -> None:
    path = write_parquet(tmp_path / "empty.parquet", pl.DataFrame(schema=schema), key="k", schema=schema)
    assert read_parquet(path).schema == schema
    assert parquet_rows(path) == 0


def test_parquet_that_is_absent_broken_or_not_ours(tmp_path: Path) -> None:
    absent, broken, theirs = (tmp_path / f"{name}.parquet" for name in ("absent", "broken", "theirs"))
    broken.write_bytes(b"PAR1" + b"\0" * 100 + b"PAR1")
    pl.DataFrame({"x": [1]}).write_parquet(theirs)
    for path in (absent, broken, theirs, tmp_path):
        assert parquet_key(path) is None
    for path in (absent, broken):
        with pytest.raises(DataError, match=str(path)):
            read_parquet(path)
        with pytest.raises(DataError, match=str(path)):
            parquet_rows(path)
    with pytest.raises(DataError, match=f"{theirs}: no column 'y'; its columns are x"):
        read_parquet(theirs, ["x", "y"])


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"α": 0.5})
    assert read_json(path) == {"α": 0.5}
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"x": float("nan")})
    assert read_json(path) == {"α": 0.5}
    path.write_text('{"α"')
    with pytest.raises(DataError, match=f"{path} is not valid JSON"):
        read_json(path)
    with pytest.raises(DataError, match="does not exist"):
        read_json(tmp_path / "absent.json")


# --- keys and seeds ----------------------------------------------------------------------------------------


def test_seeds_never_change() -> None:
    # These literals are a promise: a run is the same with every version of this program.
    assert seed_for(0, 1, 2, 3) == 7125020806537731205
    assert seed_for(7, "held out") == 2692183167972841825


def test_seeds_fit_and_differ() -> None:
    seeds = [seed_for(s, r, p, k) for s in range(3) for r in range(3) for p in range(20) for k in range(20)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_for(1, 12) != seed_for(11, 2)
    assert seed_for(1) != seed_for("1")


def test_digests_never_change_with_order_of_keys_only() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert len({digest(), digest(1), digest("1"), digest(1, 2), digest([1, 2]), digest(None)}) == 6
    assert digest("generate", 1) == "ab0a893d738239acd74b0211"


def test_a_files_digest_follows_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("a")
    first = file_digest(path)
    path.write_text("bb")
    assert file_digest(path) != first
    path.write_text("a")
    os.utime(path, ns=(1, 1))
    assert file_digest(path) == first
    with pytest.raises(DataError, match=f"{tmp_path / 'absent'} cannot be read: No such file"):
        file_digest(tmp_path / "absent")


def test_versions_leave_out_what_is_absent() -> None:
    installed = versions("polars", "no-such-package-as-this")
    assert set(installed) == {"dice-align", "polars"}


# --- the manifest ------------------------------------------------------------------------------------------


def test_manifest_is_kept_and_updated(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    manifest = Manifest(path)
    assert manifest.stage("round-01/mine") is None
    manifest.record("round-01/mine", key="k", status="running", counts={})
    manifest.record("round-01/mine", status="done", counts={"pairs": 3})
    manifest.record("round-01/replay", status="running")
    again = Manifest(path)
    assert again.stage("round-01/mine") == {"key": "k", "status": "done", "counts": {"pairs": 3}}
    assert list(again.data["stages"]) == ["round-01/mine", "round-01/replay"]
    assert again.data["created"] == manifest.data["created"]


def test_manifest_survives_a_write_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "manifest.json"
    Manifest(path).record("round-01/generate", status="done")
    before = path.read_bytes()

    def no_room(self: Path, *args: object, **options: object) -> int:
        raise NO_ROOM

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", no_room)
        with pytest.raises(DiskFullError):
            Manifest(path).record("round-01/score", status="running")
    assert path.read_bytes() == before
    assert names(tmp_path) == ["manifest.json"]


def test_a_damaged_manifest_reads_as_an_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    Manifest(path).record("round-01/generate", status="done")
    assert not Manifest(path).is_damaged
    whole = path.read_text()
    for text in (
        "{",
        "",
        "[]",
        whole[:-20],
        whole.replace("done", "dome"),
        whole.replace("dice.digest", "dice.dagest"),
    ):
        path.write_text(text)
        manifest = Manifest(path)
        assert manifest.is_damaged
        assert manifest.data["stages"] == {}


def test_a_manifest_of_an_older_version_is_read(tmp_path: Path) -> None:
    stages = {"round-01/generate": {"status": "done"}}
    write_json(tmp_path / "manifest.json", {"version": 1, "created": 1.0, "stages": stages})
    manifest = Manifest(tmp_path / "manifest.json")
    assert (manifest.is_damaged, manifest.data["stages"]) == (False, stages)


def test_files_are_readable_like_any_other(tmp_path: Path) -> None:
    write_text(tmp_path / "file", json.dumps({}))
    (tmp_path / "plain").write_text("x")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert TEMPORARY == ".tmp"
