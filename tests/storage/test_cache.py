"""The cache keeps values by kind and key, and a lost or broken file costs nothing but the values."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dice_py.storage.cache import cache_folder, recall, remember
from dice_py.storage.files import read_sealed

BROKEN = [b"", b"{", b"[1, 2]", b"null", b"\xff\xfe\x00", b'{"sizes": 3}', b'{"sizes": ["here"]}']


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DICE_CACHE", str(tmp_path / "a" / "cache"))
    return tmp_path / "a" / "cache"


def test_by_kind_and_key() -> None:
    assert recall("sizes", "here") is None
    remember("sizes", "here", 1)
    remember("sizes", "there", {"a": [2.5, None]})
    remember("times", "here", 3)
    assert [recall("sizes", "here"), recall("sizes", "there"), recall("times", "here")] == [1, {"a": [2.5, None]}, 3]
    assert recall("times", "there") is None
    remember("sizes", "here", 4)
    assert [recall("sizes", "here"), recall("sizes", "there"), recall("times", "here")] == [4, {"a": [2.5, None]}, 3]


def test_the_same_again_writes_nothing(folder: Path) -> None:
    remember("sizes", "here", 1)
    before = (folder / "remembered.json").stat()
    remember("sizes", "here", 1)
    after = (folder / "remembered.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_file_is_replaced(folder: Path, content: bytes) -> None:
    folder.mkdir(parents=True)
    (folder / "remembered.json").write_bytes(content)
    assert recall("sizes", "here") is None
    remember("sizes", "here", 1)
    assert read_sealed(folder / "remembered.json", "remembered") == {"sizes": {"here": 1}}


def test_several_at_once_lose_nothing() -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: remember("sizes", str(number), number), range(40)))
    assert [recall("sizes", str(number)) for number in range(40)] == list(range(40))


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DICE_CACHE", str(tmp_path / "file" / "cache"))
    remember("sizes", "here", 1)
    assert recall("sizes", "here") is None


def test_a_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remember("sizes", "here", 1)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    remember("sizes", "here", 2)
    assert recall("sizes", "here") == 1
    assert sorted(file.name for file in folder.iterdir()) == ["remembered.json", "remembered.lock"]


@pytest.mark.parametrize(
    ("environment", "want"),
    [
        ({"DICE_CACHE": "/d", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/d"),
        ({"XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/dice"),
        ({"XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/dice"),
        ({"HOME": "/h"}, "/h/.cache/dice"),
    ],
)
def test_where_it_is(monkeypatch: pytest.MonkeyPatch, environment: dict[str, Any], want: str) -> None:
    for name in ("DICE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(want)
