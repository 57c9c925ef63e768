"""The replay buffer: which pairs it has, which pairs are written, and the effect of kills and repeated appends."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from tiny_round import make_round

from dice_py.data import prompt_key
from dice_py.errors import DataError, UsageError
from dice_py.replay import appended as replay_appended
from dice_py.replay.appended import BUFFER, append_mined
from dice_py.replay.buffer import ReplayBuffer, priority
from dice_py.storage.parquet import parquet_key, parquet_meta, write_parquet

SIZES = {1: 30, 2: 50, 3: 20, 4: 40}


def pairs(round_number: int, rows: int) -> pl.DataFrame:
    data = [(f"{round_number}/{i}", 0.5 * i) for i in range(rows)]
    return pl.DataFrame(data, schema={"what": pl.String, "margin": pl.Float64}, orient="row")


def fill(buffer: ReplayBuffer, sizes: dict[int, int] = SIZES) -> ReplayBuffer:
    for number, rows in sizes.items():
        buffer.append(number, pairs(number, rows), f"key {number}")
    return buffer


def oracle(capacity: int, seed: int, before: int = 99, sizes: dict[int, int] = SIZES) -> list[str]:
    """The pairs of least priority, in plain Python."""
    everything = [(priority(seed, r, i), r, i) for r, n in sizes.items() if r < before for i in range(n)]
    return [f"{r}/{i}" for r, i in sorted((r, i) for _, r, i in sorted(everything)[:capacity])]


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("capacity", [1, 7, 60, 139, 140, 1000])
def test_buffer_is_the_pairs_of_least_priority(tmp_path: Path, capacity: int) -> None:
    buffer = fill(ReplayBuffer(tmp_path, capacity, 3))
    for before in (1, 2, 3, 4, 5):
        pairs_before = buffer.read(before)
        assert (pairs_before["what"].to_list() if pairs_before.height else []) == oracle(capacity, 3, before)
    kept = buffer.read()
    assert kept["what"].to_list() == oracle(capacity, 3)
    assert kept.schema == {
        "what": pl.String, "margin": pl.Float64, "round": pl.UInt32, "index": pl.UInt32, "priority": pl.UInt64,
    }  # fmt: skip
    assert [f"{r}/{i}" for r, i in kept.select("round", "index").iter_rows()] == kept["what"].to_list()
    assert (kept["margin"] == 0.5 * kept["index"]).all()


def test_pairs_that_can_never_enter_are_not_written(tmp_path: Path) -> None:
    buffer = ReplayBuffer(tmp_path, 25, 0)
    for number, rows in SIZES.items():
        written = buffer.append(number, pairs(number, rows), "key")
        # Only its pairs among the 25 least priorities of the rounds up to this one.
        up_to = [what for what in oracle(25, 0, number + 1) if what.startswith(f"{number}/")]
        assert pl.read_parquet(buffer.path(number))["what"].to_list() == up_to
        assert written == len(up_to)
        assert parquet_meta(buffer.path(number))["appended"] == rows
    on_disk = sum(pl.read_parquet(path).height for path in tmp_path.iterdir())
    assert 25 < on_disk < sum(SIZES.values()) / 2


def test_sample_is_uniform(tmp_path: Path) -> None:
    """Over many seeds, the pairs of all rounds are kept equally often."""
    seeds, capacity, sizes = 150, 12, {1: 20, 2: 5, 3: 15}
    kept: Counter[str] = Counter()
    for seed in range(seeds):
        kept.update(fill(ReplayBuffer(tmp_path / str(seed), capacity, seed), sizes).read()["what"].to_list())
    n, share = sum(sizes.values()), capacity / sum(sizes.values())
    assert kept.total() == seeds * capacity
    by_round = {r: sum(count for what, count in kept.items() if what.startswith(f"{r}/")) for r in sizes}
    for r, rows in sizes.items():
        # Hypergeometric for one seed; five standard deviations of the sum over the seeds.
        variance = capacity * (rows / n) * (1 - rows / n) * (n - capacity) / (n - 1)
        assert abs(by_round[r] - seeds * share * rows) < 5 * (seeds * variance) ** 0.5
    # One pair: binomial, 45 expected, standard deviation 5.6. All pairs: chi-square of 39 degrees of freedom (the
    # counts of one seed sum to the capacity), standard deviation 8.8.
    expected, variance = seeds * share, seeds * share * (1 - share)
    counts = [kept[f"{r}/{i}"] for r, rows in sizes.items() for i in range(rows)]
    assert all(abs(count - expected) < 5 * variance**0.5 for count in counts)
    chi_square = sum((count - expected) ** 2 for count in counts) / variance * (n - 1) / n
    assert abs(chi_square - (n - 1)) < 5 * (2 * (n - 1)) ** 0.5


def test_priorities_are_pinned() -> None:
    """If this fails, every buffer changes: SHA-256 of (seed, "replay buffer", round, index)."""
    assert priority(0, 1, 0) == 4753551509197463424
    assert len({priority(s, r, i) for s in range(3) for r in range(3) for i in range(3)}) == 27


def test_appending_twice_does_nothing(tmp_path: Path) -> None:
    buffer = fill(ReplayBuffer(tmp_path, 25, 0))
    before, keys = files(tmp_path), buffer.keys()
    assert all(buffer.is_appended(number, f"key {number}") for number in SIZES)
    assert not buffer.is_appended(2, "another key")
    assert not buffer.is_appended(5, "key 5")
    fill(ReplayBuffer(tmp_path, 25, 0))
    assert files(tmp_path) == before
    assert buffer.keys() == keys
    assert buffer.append(1, pairs(1, 30), "key 1") == pl.read_parquet(buffer.path(1)).height


def test_later_rounds_rewrite_no_file(tmp_path: Path) -> None:
    buffer = fill(ReplayBuffer(tmp_path, 25, 0))
    before = files(tmp_path)
    buffer.append(5, pairs(5, 100), "key 5")
    after = files(tmp_path)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"round-05.parquet"}
    assert buffer.keys(5) == buffer.keys()[:4]


def test_round_with_another_key_is_replaced(tmp_path: Path) -> None:
    buffer = fill(ReplayBuffer(tmp_path, 25, 0))
    buffer.append(4, pairs(4, 10), "another key")
    assert buffer.read()["what"].to_list() == oracle(25, 0, sizes=SIZES | {4: 10})
    assert buffer.rounds() == [1, 2, 3, 4]


def test_round_is_refused_after_earlier_rounds_changed(tmp_path: Path) -> None:
    buffer = fill(ReplayBuffer(tmp_path, 25, 0))
    buffer.append(2, pairs(2, 3), "another key")
    # Round 3 was sampled against 50 pairs of round 2. With 3, more of its pairs would be written.
    assert buffer.read(3)["what"].to_list() == oracle(25, 0, 3, SIZES | {2: 3})
    for use in (buffer.read, buffer.keys, lambda: buffer.append(4, pairs(4, 40), "key 4")):
        with pytest.raises(DataError, match=r"the rounds before .*round-03.parquet changed .* append round 3 again"):
            use()
    assert not buffer.is_appended(3, "key 3")
    buffer.append(3, pairs(3, 20), "key 3")
    buffer.append(4, pairs(4, 40), "key 4")
    assert buffer.read()["what"].to_list() == oracle(25, 0, sizes=SIZES | {2: 3})


def test_other_capacity_or_seed_is_refused(tmp_path: Path) -> None:
    fill(ReplayBuffer(tmp_path, 25, 0))
    for other in (ReplayBuffer(tmp_path, 26, 0), ReplayBuffer(tmp_path, 25, 1)):
        with pytest.raises(DataError, match=r"round-01.parquet belongs to a buffer of capacity 25 and seed 0, not"):
            other.read()
        assert not other.is_appended(1, "key 1")
    # After all rounds are appended again, the folder is the buffer of this seed.
    assert fill(other).read()["what"].to_list() == oracle(25, 1)


def test_files_of_a_killed_process_are_ignored(tmp_path: Path) -> None:
    buffer = fill(ReplayBuffer(tmp_path, 25, 0))
    expected, keys = buffer.read(), buffer.keys()
    (tmp_path / ".round-05.parquet.4711.tmp").write_bytes(b"PAR1 half a file")
    (tmp_path / "round-05.parquet.part").write_bytes(b"")
    assert_frame_equal(buffer.read(), expected)
    assert (buffer.keys(), buffer.rounds()) == (keys, [1, 2, 3, 4])


def test_failed_append_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = fill(ReplayBuffer(tmp_path, 25, 0), {1: 30, 2: 50})
    before = files(tmp_path)

    class Stopped(BaseException):
        pass

    def stop(*_: Any, **__: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr("pyarrow.parquet.ParquetWriter.add_key_value_metadata", stop)  # called after the rows are written
        with pytest.raises(Stopped):
            buffer.append(3, pairs(3, 20), "key 3")
    assert files(tmp_path) == before
    assert not buffer.is_appended(3, "key 3")
    assert fill(buffer).read()["what"].to_list() == oracle(25, 0)


def test_other_files_are_refused(tmp_path: Path) -> None:
    buffer = ReplayBuffer(tmp_path / "buffer", 25, 0)
    assert (buffer.rounds(), buffer.keys(), buffer.read().height) == ([], [], 0)
    assert not buffer.folder.exists()
    write_parquet(buffer.path(1), pairs(1, 3), key="some key")
    with pytest.raises(DataError, match=r"round-01.parquet is not a file of a replay buffer, or is damaged: remove it"):
        buffer.read()
    buffer.path(1).write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"round-01.parquet is not a file of a replay buffer"):
        buffer.append(2, pairs(2, 3), "key 2")


def test_invalid_arguments(tmp_path: Path) -> None:
    for capacity, seed, message in (
        (0, 0, "capacity of the replay buffer is 0"),
        (1, -1, "seed of the replay buffer is -1"),
    ):
        with pytest.raises(UsageError, match=message):
            ReplayBuffer(tmp_path, capacity, seed)
    buffer = fill(ReplayBuffer(tmp_path, 25, 0), {1: 30})
    with pytest.raises(UsageError, match="the round is -1"):
        buffer.append(-1, pairs(1, 3), "key")
    with pytest.raises(UsageError, match="column 'round' is reserved by the replay buffer"):
        buffer.append(2, pairs(2, 3).with_columns(round=pl.lit(1)), "key")
    with pytest.raises(
        DataError, match=r"round 2 have columns what String, but those of .* have what String, margin Float64"
    ):
        buffer.append(2, pairs(2, 3).select("what"), "key")
    assert buffer.rounds() == [1]


def test_round_without_pairs_counts_as_appended(tmp_path: Path) -> None:
    buffer = ReplayBuffer(tmp_path, 5, 0)
    assert buffer.append(1, pairs(1, 0), "key 1") == 0
    assert buffer.is_appended(1, "key 1")
    buffer.append(2, pairs(2, 3), "key 2")
    assert buffer.read()["what"].to_list() == ["2/0", "2/1", "2/2"]


# Mined pairs


def test_mined_pairs_are_appended_with_their_token_ids(tmp_path: Path) -> None:
    round_files = make_round(tmp_path)
    buffer = ReplayBuffer(tmp_path / "buffer", 10, 0)
    notes: list[str] = []
    append_mined(buffer, 3, **round_files, report=lambda event, **fields: notes.append(fields["text"]))
    kept = buffer.read(4)
    assert kept.select(BUFFER.names()).schema == BUFFER
    assert kept.columns == [*BUFFER.names(), "round", "index", "priority"]
    assert kept["chosen_ids"].to_list() == [[11, 4], [42, 4]]  # rows 1 and 11 of both shards
    assert kept["rejected_ids"].to_list() == [[12, 4], [40, 4]]
    assert kept["prompt_ids"].to_list() == [[100], [103]]
    assert kept["chosen"].to_list() == [[{"role": "assistant", "content": f"answer {n}"}] for n in ("0 1", "3 2")]
    assert kept["prompt"].to_list() == [[{"role": "user", "content": f"q{p}"}] for p in (0, 3)]
    assert kept["key"].to_list() == [prompt_key(messages) for messages in kept["prompt"].to_list()]
    assert kept["margin"].to_list() == pytest.approx([0.4, 0.3])
    assert set(kept["source"]) == {"round-03"}
    assert set(kept["round"]) == {3}
    assert notes == ["replay buffer: 2 of 2 mined pairs written"]


def test_appended_round_is_not_gathered_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    round_files = make_round(tmp_path)
    buffer = ReplayBuffer(tmp_path / "buffer", 10, 0)
    append_mined(buffer, 1, **round_files)
    stored = parquet_key(buffer.path(1))

    def never(*_: Any) -> None:
        raise AssertionError("gathered again")

    monkeypatch.setattr(replay_appended, "gather_from", never)
    append_mined(buffer, 1, **round_files)
    assert parquet_key(buffer.path(1)) == stored
    with pytest.raises(AssertionError, match="gathered again"):
        append_mined(buffer, 1, **(round_files | {"key": "another"}))


def test_pairs_in_parts_are_appended_as_at_once(tmp_path: Path) -> None:
    frame = pl.DataFrame({"pair": range(100)})
    whole, parts = (ReplayBuffer(tmp_path / name, 20, 3) for name in ("whole", "parts"))
    for buffer in (whole, parts):
        buffer.append(1, frame[:30], "first")
    assert whole.append(2, frame, "second") == parts.append(2, frame.iter_slices(7), "second")
    assert whole.path(2).read_bytes() == parts.path(2).read_bytes()
    assert parquet_meta(parts.path(2))["appended"] == 100
