"""Accuracies on slices of pairs: which pair is in which slice, the figures, and the worst slice."""

from __future__ import annotations

import math
import random

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dice_py.evaluation.slices import (
    OTHER_SOURCES,
    SLICES,
    accuracy_interval,
    length_buckets,
    pair_slices,
    slice_accuracies,
    worst_slice,
)

LENGTHS = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=60)


def integers(values: list[int]) -> pl.Series:
    return pl.Series(values, dtype=pl.UInt32)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(LENGTHS, st.randoms(use_true_random=False))
def test_slices_against_a_count_by_hand(lengths: list[tuple[int, int]], rng: random.Random) -> None:
    outcomes = [rng.choice([0.0, 0.5, 1.0]) for _ in lengths]
    sources = [rng.choice(["a", "b", None]) for _ in lengths]
    chosen, rejected = (integers([pair[side] for pair in lengths]) for side in (0, 1))
    found = slice_accuracies(pl.Series(outcomes), chosen, rejected, pl.Series(sources, dtype=pl.String), 0, minimum=5)
    assert found.schema == SLICES
    by_name = {row["slice"]: row for row in found.iter_rows(named=True)}
    expected = {
        "chosen longer": [c > r for c, r in lengths],
        "chosen shorter": [c < r for c, r in lengths],
        "equal length": [c == r for c, r in lengths],
    }
    counts = {name: sources.count(name) for name in ("a", "b")}
    expected |= {f"source {name}": [source == name for source in sources] for name in "ab" if counts[name] >= 5}
    small = [name for name in "ab" if counts[name] < 5]
    expected[OTHER_SOURCES] = [source in small for source in sources]
    for name, inside in expected.items():
        values = [outcome for outcome, is_in in zip(outcomes, inside, strict=True) if is_in]
        if not values:
            assert name not in by_name
            continue
        row = by_name.pop(name)
        assert row["pairs"] == len(values)
        assert row["accuracy"] == pytest.approx(sum(values) / len(values))
        assert (row["low"] is None) is (row["high"] is None) is (len(values) < 5)
        if row["low"] is not None:
            assert 0.0 <= row["low"] <= row["accuracy"] + 1e-12
            assert row["accuracy"] - 1e-12 <= row["high"] <= 1.0
    # What is left are the buckets of length: every pair is in one, and its name has its range.
    assert sum(row["pairs"] for row in by_name.values()) == len(lengths)
    means = [(c + r) / 2 for c, r in lengths]
    for name, row in by_name.items():
        low, high = (float(part) for part in name.removeprefix("length ").split(" to "))
        assert sum(low <= mean <= high for mean in means) == row["pairs"]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=200))
def test_buckets_hold_about_a_quarter_each_unless_lengths_are_equal(values: list[int]) -> None:
    names = length_buckets(pl.Series("tokens", values))
    by_length = dict(zip(values, names, strict=True))
    assert names.to_list() == [by_length[value] for value in values]
    if len(set(values)) == len(values):
        counts = names.value_counts()["count"]
        assert counts.max() <= math.ceil(len(values) / 4) + 1  # type: ignore[operator]
    assert names.n_unique() <= 4
    assert length_buckets(pl.Series([], dtype=pl.UInt32)).is_empty()


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = random.Random(0)
    truth, inside = 0.7, 0
    for trial in range(400):
        outcomes = pl.Series([float(rng.random() < truth) for _ in range(100)])
        low, high = accuracy_interval(outcomes, trial)
        inside += low <= truth <= high
    assert 0.91 <= inside / 400 <= 0.98


def test_equal_outcomes_are_not_certain() -> None:
    low, high = accuracy_interval(pl.Series([1.0] * 20), 0)
    # Wilson, 20 of 20: 20 / (20 + 1.96²).
    assert low == pytest.approx(20 / (20 + 1.959964**2), abs=1e-6)
    assert high == 1.0
    assert accuracy_interval(pl.Series([0.0] * 20), 0) == pytest.approx([0.0, 1 - low], abs=1e-12)
    assert accuracy_interval(pl.Series([1.0, 0.0] * 20), 5) == accuracy_interval(pl.Series([0.0, 1.0] * 20), 5)


def test_a_small_slice_has_no_interval_and_is_not_the_worst() -> None:
    # 30 pairs whose chosen is longer, nine in ten right; 30 whose chosen is shorter, half right; 3 equal, none right.
    outcomes = pl.Series([1.0] * 27 + [0.0] * 3 + [1.0, 0.0] * 15 + [0.0] * 3)
    chosen, rejected = integers([20] * 30 + [10] * 30 + [15] * 3), integers([10] * 30 + [20] * 30 + [15] * 3)
    slices = slice_accuracies(outcomes, chosen, rejected, None, 0)
    equal = slices.row(by_predicate=pl.col("slice") == "equal length", named=True)
    assert equal == {"slice": "equal length", "pairs": 3, "accuracy": 0.0, "low": None, "high": None}
    worst = worst_slice(slices)
    assert worst is not None
    assert (worst.name, worst.pairs, worst.accuracy) == ("chosen shorter", 30, 0.5)
    assert worst.ci95[0] < 0.5 < worst.ci95[1]
    assert worst_slice(slices.filter(pl.col("slice") == "equal length")) is None
    assert worst_slice(slices.clear()) is None


def test_sources_are_named_by_size_and_small_ones_are_together() -> None:
    sources = pl.Series(["math"] * 25 + ["chat"] * 30 + [f"one of {n}" for n in range(7)] + [None] * 4)
    lengths = integers(list(range(1, 67)))
    members = pair_slices(lengths, lengths, sources)
    assert list(members)[-3:] == ["source chat", "source math", OTHER_SOURCES]
    assert [int(inside.sum()) for inside in members.values()][-3:] == [30, 25, 7]
    # A source of that name is not confused with the others.
    named = pair_slices(lengths, lengths, pl.Series([OTHER_SOURCES] * 66))
    assert list(named)[-1] == f"source {OTHER_SOURCES}"
