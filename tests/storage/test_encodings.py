"""How columns are encoded in files: by their types, and readable by every reader."""

from __future__ import annotations

from pathlib import Path

import duckdb
import polars as pl
import pyarrow.parquet as pq
import pytest
from polars.testing import assert_frame_equal

from dice_py.storage.digests import file_state
from dice_py.storage.parquet import ParquetStream, intact_key, read_parquet, write_parquet

ROWS = 3000


@pytest.fixture
def frame() -> pl.DataFrame:
    """Every type that artifacts have; token ids repeat phrases, as text does."""
    rows = range(ROWS)
    return pl.DataFrame(
        {
            "prompt_id": pl.Series([n // 4 for n in rows], dtype=pl.UInt32),
            "token_ids": pl.Series(
                [[(n % 7) * 1000 + k for k in range(40)] for n in rows[:-2]] + [[], None], dtype=pl.List(pl.Int32)
            ),
            "response": [f"an answer, the {n * n % 997}th of {n % 7}" for n in rows],
            "logp": pl.Series([-((n * 0.37) ** 1.1) for n in rows[:-1]] + [None], dtype=pl.Float32),
            "messages": [[{"role": "user", "content": f"question {n}"}] for n in rows],
            "credit": pl.Series([[0.1 * n, 0.2] for n in rows], dtype=pl.List(pl.Float32)),
            "is_cut": [n % 3 == 0 for n in rows],
        }
    )


def encodings(file: Path) -> dict[str, set[str]]:
    group = pq.read_metadata(file).row_group(0)
    columns = [group.column(number) for number in range(group.num_columns)]
    assert {column.compression for column in columns} == {"ZSTD"}
    return {column.path_in_schema: set(column.encodings) for column in columns}


def test_each_kind_of_column_has_its_encoding(frame: pl.DataFrame, tmp_path: Path) -> None:
    found = encodings(write_parquet(tmp_path / "file.parquet", frame, key="k"))
    with ParquetStream(tmp_path / "stream.parquet") as writer:
        writer.write(frame)
        writer.describe("k", None)
    assert encodings(tmp_path / "stream.parquet") == found
    for path in ("logp", "credit.list.element"):
        assert "BYTE_STREAM_SPLIT" in found[path]
    for path in ("prompt_id", "response", "messages.list.element.role", "messages.list.element.content"):
        assert "RLE_DICTIONARY" in found[path]
    assert not found["token_ids.list.element"] & {"RLE_DICTIONARY", "PLAIN_DICTIONARY", "BYTE_STREAM_SPLIT"}


def test_every_reader_gets_the_values(frame: pl.DataFrame, tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "file.parquet", frame, key="k")
    assert intact_key(file) == "k"
    assert_frame_equal(read_parquet(file), frame)
    assert_frame_equal(pl.read_parquet(file), frame)
    assert_frame_equal(pl.scan_parquet(file).filter(pl.col("prompt_id") == 7).collect(), frame[28:32])
    assert duckdb.read_parquet(str(file)).fetchall() == duckdb.sql("select * from frame").fetchall()


def test_files_of_earlier_versions_are_read(frame: pl.DataFrame, tmp_path: Path) -> None:
    earlier = tmp_path / "earlier.parquet"
    table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
    pq.write_table(table, earlier, compression="zstd", store_schema=False)
    assert file_state(earlier) == "unmarked"
    assert_frame_equal(read_parquet(earlier), frame)
    now = write_parquet(tmp_path / "now.parquet", frame, key="k")
    assert now.stat().st_size < 0.9 * earlier.stat().st_size
