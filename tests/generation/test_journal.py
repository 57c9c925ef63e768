"""The journal of an unfinished shard: what is read back, and after which damage."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from places import child_environment
from small_disk import small_disk

from dice_py.errors import DiskFullError, InterruptedRunError
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
    samples = {row: journal.read(row) for row in sorted(journal.rows)}
    assert len(journal) == len(samples)
    journal.close()
    return samples


def test_reads_back_what_was_appended(tmp_path: Path) -> None:
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


def test_appends_to_an_existing_journal(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    write(path, range(10))
    write(path, range(10, 40))
    assert read(path) == SAMPLES


def test_a_row_that_is_appended_twice_is_the_later_one(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    journal = Journal(path, "one")
    journal.append(1, SAMPLES[1])
    journal.append(1, SAMPLES[2])
    journal.flush()
    assert journal.read(1) == SAMPLES[2]
    journal.close()
    assert read(path) == {1: SAMPLES[2]}


@pytest.mark.parametrize("key", ["two", "on", "one ", ""])
def test_journal_with_another_key_is_emptied(tmp_path: Path, key: str) -> None:
    path = tmp_path / "a.journal"
    write(path, range(10))
    write(path, [5], key=key)
    assert read(path, key) == {5: SAMPLES[5]}
    assert read(path) == {}


def test_torn_anywhere_keeps_the_complete_records(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    write(path, range(6))
    complete = path.read_bytes()
    counts = []
    for length in range(len(complete)):
        path.write_bytes(complete[:length])
        kept = read(path)
        counts.append(len(kept))
        assert kept == {row: SAMPLES[row] for row in range(len(kept))}
        # A record that is appended after the cut can be read.
        write(path, [39])
        assert read(path) == {**kept, 39: SAMPLES[39]}
    assert counts == sorted(counts)
    assert set(counts) == set(range(6))


@pytest.mark.parametrize("tail", [bytes(4096), b"\xff" * 64, b"\x10\x00\x00\x00garbage that is long enough"])
def test_garbage_behind_the_last_record_is_cut_off(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "a.journal"
    write(path, range(6))
    complete = path.read_bytes()
    path.write_bytes(complete + tail)
    assert len(read(path)) == 6
    assert path.read_bytes() == complete


def test_every_flipped_bit_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    write(path, range(4))
    complete = path.read_bytes()
    for at in range(len(complete)):
        path.write_bytes(complete[:at] + bytes([complete[at] ^ 16]) + complete[at + 1 :])
        kept = read(path)
        assert len(kept) < 4
        assert kept == {row: SAMPLES[row] for row in range(len(kept))}


def test_garbage_is_emptied(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    path.write_bytes(b"something else")
    assert read(path) == {}
    write(path, [1])
    assert read(path) == {1: SAMPLES[1]}


def test_flushed_responses_survive_the_process(tmp_path: Path) -> None:
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
    ended = subprocess.run([sys.executable, "-c", program], check=False, env=child_environment())
    assert ended.returncode == -9
    assert sorted(read(path)) == [0, 1, 2, 3, 4]


def test_remove(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a.journal", "one")
    journal.append(1, SAMPLES[1])
    journal.flush()
    journal.remove()
    assert list(tmp_path.iterdir()) == []
    journal.close()  # nothing to do


def test_a_process_that_was_given_up_harms_no_journal(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    given_up = Journal(path, "one")
    for row in range(5):
        given_up.append(row, SAMPLES[row])
    given_up.flush()
    given_up.check_ours()
    ours = Journal(path, "one")
    for journal, row in ((given_up, 6), (ours, 7), (given_up, 8), (ours, 9)):
        journal.append(row, SAMPLES[row])
        journal.flush()
    with pytest.raises(InterruptedRunError, match=r"a\.journal was taken over by another process"):
        given_up.check_ours()
    given_up.close()
    ours.check_ours()
    assert {row: ours.read(row) for row in ours.rows} == {row: SAMPLES[row] for row in (*range(5), 7, 9)}
    ours.close()
    assert sorted(read(path)) == [*range(5), 7, 9]
    assert [file.name for file in tmp_path.iterdir()] == ["a.journal"]


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
        # The disk is still full. Opening the journal cuts the torn record off, and needs no room.
        assert sorted(read(disk / "a.journal")) == written
        with pytest.raises(DiskFullError, match=r"b\.journal"):
            Journal(disk / "b.journal", "one")
        assert sorted(read(disk / "a.journal")) == written
