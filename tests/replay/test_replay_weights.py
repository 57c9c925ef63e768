"""Weights, length buckets and counts against the same formulas in plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from property_examples import examples

from dice_py import sample_replay
from dice_py.errors import DataError, UsageError
from dice_py.replay.weights import (
    age_weights,
    allocate,
    equal_counts,
    length_buckets,
    margin_weights,
    proportional_counts,
    replay_weights,
)

MARGINS = [0.0, -3.0, 0.25, 1.0, 7.5, 1e-30]
ROUNDS = [1, 5, 3, 5, 2, 4]


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [pl.Float32, pl.Float64])
def test_weights_by_margin(power: float, dtype: Any) -> None:
    margins = pl.Series(MARGINS, dtype=dtype)
    weights = margin_weights(margins, power)
    assert weights.dtype == pl.Float64
    assert weights.to_list() == pytest.approx([max(m, 0.0) ** power for m in margins.to_list()], rel=1e-15)


@pytest.mark.parametrize("half_life", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [pl.UInt8, pl.UInt32, pl.Int64])
def test_weights_by_age(half_life: float, dtype: Any) -> None:
    weights = age_weights(pl.Series(ROUNDS, dtype=dtype), current_round=5, half_life=half_life)
    assert weights.dtype == pl.Float64
    assert weights.to_list() == pytest.approx([2.0 ** (-(5 - r) / half_life) for r in ROUNDS], rel=1e-15)
    # One round more divides by the same factor, at any age.
    assert weights[4] == pytest.approx(weights[2] * 0.5 ** (1 / half_life), rel=1e-15)


def test_factors_multiply() -> None:
    pairs = pl.DataFrame({"w": [1, 2, 3, 4, 5, 6], "margin": MARGINS, "round": ROUNDS})
    weights = replay_weights(pairs, weight_column="w", margin_power=2.0, half_life=2.0, current_round=7)
    assert weights is not None
    expected = [w * max(m, 0.0) ** 2 * 2 ** (-(7 - r) / 2) for w, m, r in zip(pairs["w"], MARGINS, ROUNDS, strict=True)]
    assert weights.to_list() == pytest.approx(expected, rel=1e-14)
    assert replay_weights(pairs) is None
    alone = replay_weights(pairs, weight_column="w")
    assert alone is not None
    assert alone.equals(pairs["w"])  # unchanged, and so is the draw
    renamed = pairs.rename({"margin": "gap", "round": "made"})
    again = replay_weights(
        renamed, weight_column="w", margin_power=2.0, margin_column="gap", half_life=2.0, round_column="made",
        current_round=7,
    )  # fmt: skip
    assert again is not None
    assert again.equals(weights)


def test_draws_are_proportional_to_the_product() -> None:
    pairs = pl.DataFrame({"key": [0, 1], "margin": [1.0, 2.0], "round": [2, 1]})
    weights = replay_weights(pairs, margin_power=2.0, half_life=1.0, current_round=2)
    second = sum(sample_replay(pairs["key"], 1, seed, weights=weights)[0] for seed in range(1000))
    # Weights 1 and 4 / 2: 667 expected, standard deviation 15.
    assert 600 < second < 735


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: margin_weights(pl.Series([1.0, None])), DataError, "row 1: the margin is null"),
        (lambda: margin_weights(pl.Series([1.0, 2.0, math.nan])), DataError, "row 2: the margin is nan"),
        (lambda: margin_weights(pl.Series([math.inf])), DataError, "row 0: the margin is inf"),
        (lambda: margin_weights(pl.Series([1.0, 1e200]), 2), DataError, "row 1: .* too large for a power of 2"),
        (lambda: margin_weights(pl.Series(["a"])), DataError, "the margins have dtype String, but must be numeric"),
        (lambda: margin_weights(pl.Series([1.0]), -1.0), UsageError, "margin_power is -1.0"),
        (lambda: margin_weights(pl.Series([1.0]), math.nan), UsageError, "margin_power is nan"),
        (
            lambda: age_weights(pl.Series([1, 4]), current_round=3, half_life=1),
            DataError,
            r"row 1: the round is 4, but must be at most the current round \(3\)",
        ),
        (
            lambda: age_weights(pl.Series([None, 1]), current_round=3, half_life=1),
            DataError,
            "row 0: the round is null",
        ),
        (lambda: age_weights(pl.Series([1.0]), current_round=3, half_life=1), DataError, "must hold integers"),
        (lambda: age_weights(pl.Series([1]), current_round=3, half_life=0), UsageError, "half_life is 0"),
        (lambda: length_buckets(pl.Series([3, None]), 2), DataError, "row 1: the length is null"),
        (lambda: length_buckets(pl.Series([3.0]), 2), DataError, "must hold integers"),
        (lambda: length_buckets(pl.Series([3]), 0), UsageError, "length_buckets is 0"),
        (lambda: proportional_counts(3, [1.0, -1.0]), UsageError, "the shares are 1.0, -1.0"),
        (lambda: proportional_counts(3, [0.0]), UsageError, "no share is above zero"),
        (lambda: proportional_counts(-1, [1.0]), UsageError, "the total is -1"),
        (lambda: allocate(1, [1], "even"), UsageError, "allocation is 'even'"),  # type: ignore[arg-type]
    ],
)
def test_invalid_values(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weight_column": "v"}, DataError, "column 'v' not found .* name it with weight_column="),
        ({"margin_power": 1.0}, DataError, "column 'margin' not found .* name it with margin_column="),
        ({"half_life": 1.0, "current_round": 1}, DataError, "column 'round' not found"),
        ({"half_life": 1.0}, UsageError, "pass current_round"),
        # A margin of zero would hide the invalid weight in the product.
        ({"weight_column": "w", "margin_power": 1.0, "margin_column": "m"}, DataError, "row 1: the weight is -1.0"),
        ({"weight_column": "big", "margin_power": 1.0, "margin_column": "big"}, DataError, "row 0: the product .* inf"),
    ],
)
def test_invalid_columns(options: dict[str, Any], error: type[Exception], message: str) -> None:
    pairs = pl.DataFrame({"w": [1.0, -1.0], "m": [1.0, 0.0], "big": [1e200, 1.0]})
    with pytest.raises(error, match=message):
        replay_weights(pairs, **options)


@settings(max_examples=examples(200), deadline=None)
@given(lengths=st.lists(st.integers(0, 20), max_size=40), buckets=st.integers(1, 7))
def test_length_buckets(lengths: list[int], buckets: int) -> None:
    computed = length_buckets(pl.Series(lengths, dtype=pl.UInt32), buckets)
    ordered, n = sorted(lengths), len(lengths)
    cuts = [ordered[math.ceil(Fraction(j * n, buckets)) - 1] for j in range(1, buckets)] if n else []
    assert computed.to_list() == [sum(cut < length for cut in cuts) for length in lengths]
    if n and len(set(lengths)) == n and n % buckets == 0:
        assert set(computed.value_counts()["count"]) == {n // buckets}


@settings(max_examples=examples(300), deadline=None)
@given(
    total=st.integers(0, 200), shares=st.lists(st.one_of(st.integers(0, 9), st.floats(0, 1)), min_size=1, max_size=6)
)
def test_proportional_counts(total: int, shares: list[float]) -> None:
    if not any(shares):
        return
    counts = proportional_counts(total, shares)
    quotas = [Fraction(total) * Fraction(share) / sum(map(Fraction, shares)) for share in shares]
    # Hamilton's method, one at a time: the next goes to the largest remainder, and the first wins ties.
    expected = [math.floor(quota) for quota in quotas]
    left = [quota - floor for quota, floor in zip(quotas, expected, strict=True)]
    while sum(expected) < total:
        at = left.index(max(left))
        expected[at] += 1
        left[at] = Fraction(-1)
    assert counts == expected


def test_earlier_counts_win_ties() -> None:
    assert proportional_counts(10, [1, 1, 1, 1]) == [3, 3, 2, 2]
    assert proportional_counts(2, [0.5, 0.25, 0.25]) == [1, 1, 0]
    assert equal_counts(10, [10, 10, 10, 10]) == [3, 3, 2, 2]
    assert equal_counts(9, [10, 10, 1, 10]) == [3, 3, 1, 2]


@settings(max_examples=examples(300), deadline=None)
@given(total=st.integers(0, 60), available=st.lists(st.integers(0, 12), max_size=6))
def test_equal_counts(total: int, available: list[int]) -> None:
    # One row at a time, from the stratum with the fewest drawn rows that has rows left; the first wins ties.
    expected = [0] * len(available)
    for _ in range(min(total, sum(available))):
        unfilled = [i for i, rows in enumerate(available) if expected[i] < rows]
        expected[min(unfilled, key=lambda i: expected[i])] += 1
    assert equal_counts(total, available) == expected


@settings(max_examples=examples(200), deadline=None)
@given(total=st.integers(0, 60), available=st.lists(st.integers(0, 12), max_size=6))
@pytest.mark.parametrize("allocation", ["proportional", "equal"])
def test_no_count_exceeds_its_stratum(allocation: Any, total: int, available: list[int]) -> None:
    counts = allocate(total, available, allocation)
    assert sum(counts) == min(total, sum(available))
    assert all(0 <= count <= rows for count, rows in zip(counts, available, strict=True))
