"""The sample of pairs to read: proportional in every stratum, and decided by the seed alone."""

from __future__ import annotations

import random

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dice_py.mining.pair_sample import draw_pairs, gap_bucket, proportional

SOURCES = {"mined": 900, "replay": 80, "replay:uf": 19, "replay:rounds": 1}


def pairs() -> pl.DataFrame:
    rng = random.Random(0)
    rows = [
        (source, rng.choice([1, 10, 12, 40]), rng.choice([10, 11, 100]))
        for source, n in SOURCES.items()
        for _ in range(n)
    ]
    return pl.DataFrame(rows, schema=["source", "chosen_tokens", "rejected_tokens"], orient="row")


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.data())
def test_shares_are_proportional_and_fit(sizes: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, sum(sizes)))
    shares = proportional(sizes, count)
    assert sum(shares) == count
    assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
    if count >= len(sizes):
        assert min(shares) >= 1
    exact = [count * size / sum(sizes) for size in sizes]
    raised = sum(share == 1 and want < 1 for share, want in zip(shares, exact, strict=True))
    assert all(abs(share - want) < 1 + raised for share, want in zip(shares, exact, strict=True))


def test_every_source_and_bucket_is_drawn_in_proportion() -> None:
    frame = pairs()
    rows = draw_pairs(frame, 100, seed=1)
    assert rows == sorted(set(rows))
    assert len(rows) == 100
    counts = dict(frame[rows]["source"].value_counts().iter_rows())
    assert counts == {"mined": 89, "replay": 8, "replay:uf": 2, "replay:rounds": 1}
    bucket = gap_bucket("chosen_tokens", "rejected_tokens").alias("bucket")
    of_mined = [part.filter(source="mined").with_columns(bucket) for part in (frame, frame[rows])]
    everywhere, drawn = (dict(part["bucket"].value_counts().iter_rows()) for part in of_mined)
    assert drawn.keys() == everywhere.keys()
    assert all(abs(drawn[at] - 89 * size / 900) <= 1 for at, size in everywhere.items())


def test_the_seed_alone_decides() -> None:
    frame = pairs()
    assert draw_pairs(frame, 50, seed=1) == draw_pairs(frame.rechunk(), 50, seed=1)
    drawn = {tuple(draw_pairs(frame, 50, seed=seed)) for seed in range(4)}
    assert len(drawn) == 4
    # Of a stratum every pair comes up: over the seeds nearly all of the 900 do.
    seen = {row for seed in range(60) for row in draw_pairs(frame, 100, seed)}
    assert len(seen) > 990


@pytest.mark.parametrize("count", [1000, 2000])
def test_few_pairs_are_all_taken(count: int) -> None:
    assert draw_pairs(pairs(), count, seed=0) == list(range(1000))


def test_fewer_pairs_than_sources() -> None:
    assert len(draw_pairs(pairs(), 2, seed=0)) == 2
    assert draw_pairs(pairs().clear(), 5, seed=0) == []


@pytest.mark.parametrize(
    ("chosen", "rejected", "bucket"),
    [
        (0, 10, 0), (4, 10, 0), (5, 10, 1), (89, 100, 1), (9, 10, 2), (0, 0, 2), (10, 9, 2), (100, 89, 3), (10, 5, 3),
        (10, 4, 4),
    ],
)  # fmt: skip
def test_buckets_of_the_gap(chosen: int, rejected: int, bucket: int) -> None:
    frame = pl.DataFrame({"c": [chosen], "r": [rejected]})
    assert frame.select(gap_bucket("c", "r")).item() == bucket
