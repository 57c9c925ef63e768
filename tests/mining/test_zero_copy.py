"""Nothing is copied on the way into Rust: it sees the very buffers of the frame, chunk by chunk."""

from __future__ import annotations

from typing import Any

import polars as pl
import pyarrow as pa
import pytest

from dice_py import _native, mine_pairs

COLUMNS = ("prompt_id", "reward", "response_tokens")


def table(rows: int = 1000, chunks: int = 3) -> pa.Table:
    """Chunks that cut prompts in two."""
    part = pa.record_batch(
        {
            "prompt_id": pa.array([i // 7 for i in range(rows)], pa.uint32()),
            "reward": pa.array([float(i % 5) for i in range(rows)], pa.float32()),
            "response_tokens": pa.array([i % 11 for i in range(rows)], pa.uint32()),
        }
    )
    size = rows // chunks
    pieces = [part.slice(i * size, size if i < chunks - 1 else None) for i in range(chunks)]
    # Buffers of their own for each chunk.
    return pa.Table.from_batches([pa.record_batch({n: pa.concat_arrays([p[n]]) for n in COLUMNS}) for p in pieces])


def addresses(data: pa.Table) -> list[tuple[int, ...]]:
    """Where the values of each chunk start."""

    def address(column: Any) -> int:
        start: int = column.buffers()[1].address
        width: int = column.type.bit_width // 8
        offset: int = column.offset
        return start + offset * width

    return [tuple(address(batch[name]) for name in COLUMNS) for batch in data.to_batches()]


def seen_by_rust(monkeypatch: pytest.MonkeyPatch, frame: Any) -> list[tuple[int, ...]]:
    """The addresses in the stream that `mine_pairs` hands over."""
    seen: list[tuple[int, ...]] = []
    native = _native.mine

    def spy(stream: Any, options: Any) -> Any:
        seen.extend(_native.addresses(stream))
        return native(stream, options)

    with monkeypatch.context() as patch:
        patch.setattr(_native, "mine", spy)
        mine_pairs(frame)
    return seen


def test_pyarrow_chunks_are_used_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    data = table()
    expected = addresses(data)
    assert len(set(expected)) == 3
    assert seen_by_rust(monkeypatch, data) == expected


def test_polars_chunks_are_used_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    data = table()
    frame = pl.DataFrame(pl.from_arrow(data, rechunk=False))
    assert frame.n_chunks() == 3
    assert seen_by_rust(monkeypatch, frame) == addresses(data)
    assert seen_by_rust(monkeypatch, frame.lazy()) == addresses(data)
    # The frame itself was left as it was.
    assert frame.n_chunks() == 3


def test_slices_are_used_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    data = table()
    frame = pl.DataFrame(pl.from_arrow(data, rechunk=False))[100:900]
    assert seen_by_rust(monkeypatch, frame) == addresses(data.slice(100, 800))


def test_the_frames_own_export_would_copy() -> None:
    """Why mine.py exports a struct column. If this fails, that detour can go."""
    frame = pl.DataFrame(pl.from_arrow(table(), rechunk=False))
    named = frame.select(prompt="prompt_id", reward="reward", length="response_tokens")
    assert len(_native.addresses(named.to_struct("rows"))) == 3
    assert len(_native.addresses(named)) == 1


def test_columns_of_unlike_chunks_still_work() -> None:
    data = table()
    frame = pl.DataFrame(pl.from_arrow(data, rechunk=False))
    rewards = pl.concat([frame["reward"].rechunk()[:123], frame["reward"].rechunk()[123:]], rechunk=False)
    unlike = frame.drop("reward").with_columns(rewards)
    assert mine_pairs(unlike).pairs.equals(mine_pairs(frame.rechunk()).pairs)
