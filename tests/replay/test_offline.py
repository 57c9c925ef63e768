"""mix_replay and sample_replay: counts for a share, sampling, and the shortfall when there are too few pairs."""

from __future__ import annotations

import json
import math
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from property_examples import examples

from dice_py import mix_replay, sample_replay
from dice_py.errors import DataError, UsageError


def mined(rows: int = 10) -> pl.DataFrame:
    return pl.DataFrame({"prompt_id": range(rows)}, schema={"prompt_id": pl.UInt32})


def offline(rows: int = 100, first: int = 0, **columns: Any) -> pl.DataFrame:
    keys = pl.Series("prompt_id", range(first, first + rows), dtype=pl.UInt32)
    return pl.DataFrame([keys, *(pl.Series(name, values) for name, values in columns.items())])


def test_sampling_is_seeded_and_without_replacement() -> None:
    keys = offline(1000)["prompt_id"]
    rows = sample_replay(keys, 300, 7)
    assert rows.dtype == pl.UInt64
    assert rows.is_sorted()
    assert rows.n_unique() == 300
    assert rows.equals(sample_replay(keys, 300, 7))
    assert not rows.equals(sample_replay(keys, 300, 8))


def test_generator_is_pinned() -> None:
    """If this fails, every run with this seed changes: ChaCha8, stream 0, the sampling of the crate `rand`."""
    keys = offline(1000)["prompt_id"]
    weights = pl.Series([1.0, 2.0] * 500)
    assert sample_replay(keys, 5, 0).to_list() == [465, 507, 652, 706, 728]
    assert sample_replay(keys, 5, 0, weights=weights).to_list() == [39, 248, 601, 771, 897]


def test_chunks_do_not_change_the_draw() -> None:
    keys = offline(1000)["prompt_id"]
    weights = pl.Series("w", [float(i % 7) for i in range(1000)])
    chunked = pl.concat([keys[:333], keys[333:335], keys[335:]], rechunk=False)
    assert chunked.n_chunks() == 3
    for row_weights in (None, weights):
        one = sample_replay(keys, 50, 3, weights=row_weights)
        assert one.equals(sample_replay(chunked, 50, 3, weights=row_weights))


def test_excluded_keys_are_not_drawn() -> None:
    rows = sample_replay(offline(100)["prompt_id"], 50, 0, exclude=pl.Series(range(50), dtype=pl.UInt32))
    assert rows.to_list() == list(range(50, 100))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (pl.UInt32, pl.UInt32),
        (pl.UInt32, pl.Int64),
        (pl.UInt64, pl.Int8),
        (pl.String, pl.String),
        (pl.Categorical, pl.String),
        (pl.Float64, pl.Float64),
    ],
)
def test_key_dtypes(left: Any, right: Any) -> None:
    def keys(values: range, dtype: Any) -> pl.Series:
        numbers = pl.Series(values)
        return numbers.cast(pl.String).cast(dtype) if dtype == pl.Categorical else numbers.cast(dtype)

    rows = sample_replay(keys(range(20), left), 10, 0, exclude=keys(range(10), right))
    assert rows.to_list() == list(range(10, 20))


def test_weights_of_zero_are_never_drawn() -> None:
    data = offline(100, weight=[float(i % 2) for i in range(100)])
    rows = sample_replay(data["prompt_id"], 50, 0, weights=data["weight"])
    assert all(row % 2 for row in rows)
    with pytest.raises(DataError, match="51 offline rows were requested, but only 50 of 100 can be drawn"):
        sample_replay(data["prompt_id"], 51, 0, weights=data["weight"])


def test_draws_are_proportional_to_weights() -> None:
    keys = offline(2)["prompt_id"]
    weights = pl.Series([1.0, 3.0], dtype=pl.Float32)
    second = sum(sample_replay(keys, 1, seed, weights=weights)[0] for seed in range(1000))
    # 750 expected, standard deviation 14.
    assert 690 < second < 810


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, None])
def test_invalid_weights(bad: float | None) -> None:
    with pytest.raises(DataError, match="row 2: the weight is"):
        sample_replay(offline(3)["prompt_id"], 1, 0, weights=pl.Series([1.0, 1.0, bad]))


def test_invalid_input() -> None:
    keys = offline(3)["prompt_id"]
    with pytest.raises(DataError, match="row 1: the key is null"):
        sample_replay(pl.Series([1, None, 3]), 1, 0)
    with pytest.raises(DataError, match="must be numeric"):
        sample_replay(keys, 1, 0, weights=pl.Series(["a", "b", "c"]))
    with pytest.raises(DataError, match="cannot be compared"):
        sample_replay(keys, 1, 0, exclude=pl.Series(["1"]))
    with pytest.raises(UsageError, match="3 keys and 1 weights"):
        sample_replay(keys, 1, 0, weights=pl.Series([1.0]))
    with pytest.raises(UsageError, match="n is -1"):
        sample_replay(keys, -1, 0)
    for seed in (-1, 2**64):
        with pytest.raises(UsageError, match="seed is"):
            sample_replay(keys, 1, seed)


@pytest.mark.parametrize(("gamma", "replay"), [(0.0, 0), (0.2, 3), (0.5, 10), (0.75, 30)])
def test_all_mined_pairs_and_a_share_of_offline_pairs(gamma: float, replay: int) -> None:
    mix = mix_replay(mined(), offline(), gamma=gamma, seed=0)
    assert mix.mined_rows.to_list() == list(range(10))
    assert mix.replay == replay
    # Mined prompts are excluded.
    assert all(row >= 10 for row in mix.replay_rows)
    assert mix.candidates == 90
    assert mix.shortfall == {"mined": 0, "replay": 0}
    assert mix.reached_share == replay / (replay + 10)


def test_gamma_of_one_replays_only() -> None:
    mix = mix_replay(mined(), offline(), gamma=1.0, seed=0)
    assert (mix.mined, mix.replay, mix.reached_share) == (0, 10, 1.0)


@settings(max_examples=examples(60), deadline=None)
@given(gamma=st.floats(0, 1), total=st.integers(0, 40), seed=st.integers(0, 2**64 - 1))
def test_total(gamma: float, total: int, seed: int) -> None:
    mix = mix_replay(mined(40), offline(100, first=20), gamma=gamma, seed=seed, total=total)
    assert mix.mined + mix.replay == total
    assert abs(mix.replay - gamma * total) <= 0.5
    assert mix.mined_rows.n_unique() == mix.mined
    assert all(row >= 20 for row in mix.replay_rows)


def test_mined_and_offline_draws_do_not_share_random_numbers() -> None:
    mix = mix_replay(mined(1000), offline(1000, first=1000), gamma=0.5, seed=0, total=200)
    assert mix.mined == mix.replay == 100
    assert not mix.mined_rows.equals(mix.replay_rows)


def test_shortfall() -> None:
    few = offline(15)
    with pytest.raises(
        DataError, match=r"takes 10 mined and 10 offline pairs, but there are 10 mined pairs, and 5 of 15 offline"
    ):
        mix_replay(mined(), few, gamma=0.5, seed=0)
    mix = mix_replay(mined(), few, gamma=0.5, seed=0, on_shortfall="record")
    assert mix.shortfall == {"mined": 0, "replay": 5}
    assert mix.reached_share == 5 / 15
    assert mix.summary()["requested_share"] == 0.5
    with pytest.raises(DataError, match="takes 50 mined and 50 offline"):
        mix_replay(mined(), offline(), gamma=0.5, seed=0, total=100)
    empty = mix_replay(mined(0), few.clear(), gamma=0.5, seed=0)
    assert json.loads(json.dumps(empty.summary(), allow_nan=False))["reached_share"] is None


def test_weight_column() -> None:
    data = offline(100, w=[0.0] * 90 + [1.0] * 10)
    mix = mix_replay(mined(), data, gamma=0.5, seed=0, weight_column="w")
    assert mix.replay_rows.to_list() == list(range(90, 100))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gamma": -0.1}, UsageError, "gamma is -0.1"),
        ({"gamma": 1.1}, UsageError, "gamma is 1.1"),
        ({"gamma": math.nan}, UsageError, "gamma is nan"),
        ({"total": -1}, UsageError, "total is -1"),
        ({"on_shortfall": "ignore"}, UsageError, "on_shortfall is 'ignore'"),
        ({"key_column": "id"}, DataError, "'id' not found in the mined pairs; columns are prompt_id"),
        ({"weight_column": "w"}, DataError, "'w' not found in the offline pairs"),
    ],
)
def test_invalid_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mix_replay(mined(), offline(), **({"gamma": 0.5, "seed": 0} | options))
