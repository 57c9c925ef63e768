"""Parquet files of any content: rows, or a sentence. Polars' own reader panics on damaged ones, or ends the process."""

from __future__ import annotations

import random
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dice_py.errors import DataError
from dice_py.mining.files import mine_files
from dice_py.storage.parquet import parquet_batches, parquet_rows, read_parquet

FLIPS = 300


def flipped(path: Path, seed: int) -> Path:
    """A copy with one bit flipped, half of the times in the last 1,200 bytes, where the footer is."""
    data, draw = bytearray(path.read_bytes()), random.Random(seed)
    start = max(0, len(data) - 1200) if seed % 2 else 0
    bit = draw.randrange(8 * start, 8 * len(data))
    data[bit // 8] ^= 1 << (bit % 8)
    path.with_name("flipped.parquet").write_bytes(data)
    return path.with_name("flipped.parquet")


def test_a_damaged_file_of_the_users_own_is_read_or_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    columns = {"prompt": ["q", None] * 20, "chosen": [[{"role": "assistant", "content": "a"}]] * 40, "n": [[1, 2]] * 40}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    refused = 0
    for seed in range(FLIPS):
        try:
            read_parquet(flipped(tmp_path / "rows.parquet", seed))
        except DataError:
            refused += 1
    assert 0 < refused < FLIPS
    assert "panicked" not in capfd.readouterr().err


def test_damaged_responses_are_mined_or_refused(tmp_path: Path) -> None:
    columns = {"prompt_id": [n // 4 for n in range(40)], "reward": [0.1 * n for n in range(40)]}
    lengths = {"response_tokens": [5 + n % 7 for n in range(40)], "finish_reason": ["stop"] * 40}
    pq.write_table(pa.table({**columns, **lengths}), tmp_path / "rows.parquet")
    refused = 0
    for seed in range(FLIPS):
        try:
            mine_files([str(flipped(tmp_path / "rows.parquet", seed))], tmp_path / "out.parquet")
        except DataError:
            refused += 1
    assert 0 < refused < FLIPS


def test_no_flipped_bit_ends_the_rows_early(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"reward": [0.5] * 40}), file)
    data = file.read_bytes()
    refused = 0
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << (bit % 8)
        file.write_bytes(damaged)
        try:
            rows = parquet_rows(file)
            assert sum(map(len, parquet_batches(file))) == rows == len(read_parquet(file))
        except DataError as error:
            refused += "rows, and" in str(error)
    # pyarrow 26 alone would have read fewer rows from these, without an error.
    assert refused


def test_a_type_that_cannot_be_held_is_named(tmp_path: Path) -> None:
    wide = pa.array([{"x": Decimal(1)}], pa.struct([("x", pa.decimal256(50, 2))]))
    pq.write_table(pa.table({"a": [1], "wide": wide}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows.parquet: column 'wide.x' has the Arrow type decimal256"):
        read_parquet(tmp_path / "rows.parquet")
    assert read_parquet(tmp_path / "rows.parquet", ["a"])["a"].to_list() == [1]
