"""The journal of an unfinished shard: what is read back, and after which damage."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from small_disk import small_disk

from dice_py.errors import DiskFullError
from dice_py.generation.engines.base import Sample
from dice_py.generation.journal import Journal

SAMPLES = {
    row: Sample([row, 2**31 - 1, *range(row * 3)], ("stop", "length")[row % 2], -0.1 * row - 1e-12) for row in range(40)
}


def write(path: Path, rows: range | list[int], key: str = "one") -> None:
    journal = Journal(path, key)
    for row in rows:
        journal.append(row, SAMPLES[row])
    journal.flush()
    journal.close()


def read(path: Path, key: str = "one") -> dict[int, Sample]:
    journal = Journal(path, key)
    found = {row: journal.read(row) for row in sorted(journal.rows)}
    assert len(journal) == len(found)
    journal.close()
    return found


def test_gives_back_what_was_appended(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.journal"
    journal = Journal(path, "one")
    assert len(journal) == 0
    for row in (7, 3, 30):
        journal.append(row, SAMPLES[row])
    assert journal.rows == {3, 7, 30}
    journal.flush()
    journal.append(0, Sample([], "length", 0.0))
    journal.flush()
    assert [journal.read(row) for row in (3, 30, 0, 7)] == [
        SAMPLES[3],
        SAMPLES[30],
        Sample([], "length", 0.0),
        SAMPLES[7],
    ]
    journal.close()
    assert read(path) == {0: Sample([], "length", 0.0), 3: SAMPLES[3], 7: SAMPLES[7], 30: SAMPLES[30]}


def test_goes_on_where_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    write(path, range(10))
    write(path, range(10, 40))
    assert read(path) == SAMPLES


def test_a_row_that_comes_twice_is_the_later_one(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    journal = Journal(path, "one")
    journal.append(1, SAMPLES[1])
    journal.append(1, SAMPLES[2])
    journal.flush()
    assert journal.read(1) == SAMPLES[2]
    journal.close()
    assert read(path) == {1: SAMPLES[2]}


@pytest.mark.parametrize("key", ["two", "on", "one ", ""])
def test_of_another_key_is_dropped(tmp_path: Path, key: str) -> None:
    path = tmp_path / "a.journal"
    write(path, range(10))
    write(path, [5], key=key)
    assert read(path, key) == {5: SAMPLES[5]}
    assert read(path) == {}


def test_torn_anywhere_gives_what_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    write(path, range(6))
    whole = path.read_bytes()
    counts = []
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        found = read(path)
        counts.append(len(found))
        assert found == {row: SAMPLES[row] for row in range(len(found))}
        # And what is appended behind the cut is read again.
        write(path, [39])
        assert read(path) == {**found, 39: SAMPLES[39]}
    assert counts == sorted(counts)
    assert set(counts) == set(range(6))


@pytest.mark.parametrize("tail", [bytes(4096), b"\xff" * 64, b"\x10\x00\x00\x00garbage that is long enough"])
def test_rubbish_behind_the_last_record_is_cut_off(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "a.journal"
    write(path, range(6))
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert len(read(path)) == 6
    assert path.read_bytes() == whole


def test_every_flipped_bit_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    write(path, range(4))
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        found = read(path)
        assert len(found) < 4
        assert found == {row: SAMPLES[row] for row in range(len(found))}


def test_rubbish_is_no_journal(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    path.write_bytes(b"something else")
    assert read(path) == {}
    write(path, [1])
    assert read(path) == {1: SAMPLES[1]}


def test_what_was_flushed_outlives_the_process(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    program = f"""
import os, signal
from pathlib import Path
from dice_py.generation.engines.base import Sample
from dice_py.generation.journal import Journal
journal = Journal(Path({str(path)!r}), "one")
for row in range(5):
    journal.append(row, Sample([row], "stop", -1.0))
journal.flush()
journal.append(5, Sample([5], "stop", -1.0))
os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-c", program], check=False, cwd=Path(__file__).parents[1])
    assert ended.returncode == -9
    assert sorted(read(path)) == [0, 1, 2, 3, 4]


def test_remove(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a.journal", "one")
    journal.append(1, SAMPLES[1])
    journal.flush()
    journal.remove()
    assert list(tmp_path.iterdir()) == []
    journal.close()  # nothing to do


def test_full_disk(tmp_path: Path) -> None:
    written = []

    def fill(journal: Journal) -> None:
        for row in range(1000):
            journal.append(row, Sample(list(range(100)), "stop", -1.0))
            journal.flush()
            written.append(row)

    with small_disk(tmp_path / "disk") as disk:
        journal = Journal(disk / "a.journal", "one")
        with pytest.raises(DiskFullError, match=r"a\.journal.*are kept\. Free some space, then `dice resume`"):
            fill(journal)
        journal.close()
        # Still full: opening it cuts the torn record off, and needs no room.
        assert sorted(read(disk / "a.journal")) == written
        with pytest.raises(DiskFullError, match=r"b\.journal"):
            Journal(disk / "b.journal", "one")
        assert sorted(read(disk / "a.journal")) == written
