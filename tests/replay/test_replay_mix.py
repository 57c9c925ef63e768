"""Replay by strata and from several buffers: how the count is divided, and that no pair is drawn twice."""

from __future__ import annotations

import json
from typing import Any

import polars as pl
import pytest

from dice_py import mix_replay, sample_replay
from dice_py.errors import DataError, UsageError
from dice_py.replay.mix import OfflineBuffer, mix_buffers
from dice_py.replay.sampling import draw
from dice_py.replay.weights import length_buckets, replay_weights
from dice_py.storage.keys import seed_for


def mined(rows: int = 10) -> pl.DataFrame:
    return pl.DataFrame({"prompt_id": range(rows)}, schema={"prompt_id": pl.UInt32})


def offline(rows: int = 100, first: int = 0, **columns: Any) -> pl.DataFrame:
    keys = pl.Series("prompt_id", range(first, first + rows), dtype=pl.UInt32)
    return pl.DataFrame([keys, *(pl.Series(name, values) for name, values in columns.items())])


# Strata


def strata_counts(rows: pl.Series, strata: list[Any]) -> dict[Any, int]:
    return {label: sum(strata[row] == label for row in rows) for label in sorted(set(strata))}


STRATA = ["a"] * 60 + ["b"] * 30 + ["c"] * 10


@pytest.mark.parametrize(
    ("allocation", "n", "expected"),
    [
        ("proportional", 10, {"a": 6, "b": 3, "c": 1}),
        ("proportional", 13, {"a": 8, "b": 4, "c": 1}),  # quotas 7.8, 3.9, 1.3
        ("equal", 12, {"a": 4, "b": 4, "c": 4}),
        ("equal", 50, {"a": 20, "b": 20, "c": 10}),  # c has 10 of its 17
        ("equal", 81, {"a": 41, "b": 30, "c": 10}),
    ],
)
def test_count_is_divided_among_strata(allocation: Any, n: int, expected: dict[str, int]) -> None:
    keys = offline(100)["prompt_id"]
    rows = sample_replay(keys, n, 3, strata=pl.Series(STRATA), allocation=allocation)
    assert strata_counts(rows, STRATA) == expected
    assert rows.dtype == pl.UInt64
    assert rows.is_sorted()
    assert rows.n_unique() == n
    assert rows.equals(sample_replay(keys, n, 3, strata=pl.Series(STRATA), allocation=allocation))
    assert not rows.equals(sample_replay(keys, n, 4, strata=pl.Series(STRATA), allocation=allocation))


def test_strata_count_candidates() -> None:
    keys = offline(100)["prompt_id"]
    weights = pl.Series([0.0] * 30 + [1.0] * 70)
    drawn = draw(keys, 20, 0, exclude=keys[60:70], weights=weights, strata=pl.Series(STRATA))
    assert drawn.strata is not None
    assert drawn.strata.rows() == [("a", 30, 10), ("b", 20, 7), ("c", 10, 3)]
    assert drawn.candidates == 60
    assert not set(drawn.rows) & ({*range(30)} | {*range(60, 70)})
    with pytest.raises(DataError, match="61 offline rows were requested, but only 60 of 100 can be drawn"):
        sample_replay(keys, 61, 0, exclude=keys[60:70], weights=weights, strata=pl.Series(STRATA))


def test_strata_have_separate_streams() -> None:
    """If this fails, every stratified run changes: stream 2 + rank of the stratum."""
    keys = offline(100)["prompt_id"]
    strata = pl.Series(STRATA)
    rows = sample_replay(keys, 10, 0, strata=strata)
    assert rows.to_list() == [4, 6, 18, 38, 49, 52, 61, 67, 85, 96]
    # A stratum without candidates changes neither the counts nor the rows of the others.
    without = sample_replay(keys, 4, 0, exclude=keys[:60], strata=strata)
    assert without.to_list() == [row for row in rows if row >= 60]
    chunked = pl.concat([strata[:33], strata[33:61], strata[61:]], rechunk=False)
    assert sample_replay(pl.concat([keys[:5], keys[5:]], rechunk=False), 10, 0, strata=chunked).equals(rows)


def test_weights_apply_within_strata() -> None:
    keys = offline(4)["prompt_id"]
    strata, weights = pl.Series([1, 1, 2, 2]), pl.Series([1.0, 3.0, 100.0, 300.0])
    heavy = {1: 0, 3: 0}
    for seed in range(1000):
        rows = sample_replay(keys, 2, seed, weights=weights, strata=strata).to_list()
        assert (rows[0] in (0, 1), rows[1] in (2, 3)) == (True, True)
        heavy[1] += rows[0] == 1
        heavy[3] += rows[1] == 3
    # 750 expected of each, standard deviation 14.
    assert all(690 < count < 810 for count in heavy.values())


@pytest.mark.parametrize("dtype", [pl.Int8, pl.UInt64, pl.String, pl.Categorical, pl.Boolean])
def test_dtypes_of_strata(dtype: Any) -> None:
    labels = pl.Series([0, 1] * 50)
    strata = labels.cast(pl.String).cast(dtype) if dtype == pl.Categorical else labels.cast(dtype)
    rows = sample_replay(offline(100)["prompt_id"], 10, 0, strata=strata)
    assert sum(row % 2 for row in rows) == 5


def test_invalid_strata() -> None:
    keys = offline(3)["prompt_id"]
    with pytest.raises(DataError, match="row 1: the stratum is null"):
        sample_replay(keys, 1, 0, strata=pl.Series(["a", None, "b"]))
    with pytest.raises(DataError, match="the strata have dtype Float64"):
        sample_replay(keys, 1, 0, strata=pl.Series([1.0, 2.0, 3.0]))
    with pytest.raises(UsageError, match="3 keys and 1 strata"):
        sample_replay(keys, 1, 0, strata=pl.Series(["a"]))
    with pytest.raises(UsageError, match="allocation is 'even'"):
        sample_replay(keys, 1, 0, strata=pl.Series(["a", "a", "b"]), allocation="even")  # type: ignore[arg-type]


def test_mix_by_length() -> None:
    lengths = [(7 * i) % 83 for i in range(100)]
    data = offline(100, length=lengths)
    mix = mix_replay(mined(20), data, gamma=0.5, seed=0, stratify_by="length", length_buckets=4, allocation="equal")
    buckets = length_buckets(pl.Series(lengths), 4).to_list()  # of all rows, mined prompts included
    assert strata_counts(mix.replay_rows, buckets) == {0: 5, 1: 5, 2: 5, 3: 5}
    assert mix.strata is not None
    spans = [
        f"{min(x for x, b in zip(lengths, buckets, strict=True) if b == k)}-"
        f"{max(x for x, b in zip(lengths, buckets, strict=True) if b == k)}"
        for k in range(4)
    ]
    assert mix.summary()["strata"] == dict.fromkeys(spans, 5)
    assert all(row >= 20 for row in mix.replay_rows)


def test_mix_by_source_with_weights() -> None:
    data = offline(
        100, origin=STRATA, margin=[float(i % 5) - 1 for i in range(100)], round=[1 + i % 3 for i in range(100)]
    )
    options: dict[str, Any] = {"margin_power": 2.0, "half_life": 1.5, "current_round": 3}
    mix = mix_replay(mined(10), data, gamma=0.5, seed=1, stratify_by="source", source_column="origin", **options)
    rows = sample_replay(
        data["prompt_id"],
        10,
        1,
        exclude=mined(10)["prompt_id"],
        weights=replay_weights(data, **options),
        strata=data["origin"],
    )
    assert mix.replay_rows.equals(rows)
    assert all(data["margin"][row] > 0 for row in rows)
    # Of the 90 rows that are not mined, 3 in 5 have a margin above zero: 30, 18 and 6.
    assert mix.strata is not None
    assert mix.strata.rows() == [("a", 30, 6), ("b", 18, 3), ("c", 6, 1)]


# Several buffers


def pairs(first: int, rows: int, **columns: Any) -> pl.DataFrame:
    """Pairs with distinct answers."""
    numbers = range(first, first + rows)
    return offline(
        rows, first, chosen=[f"good {n}" for n in numbers], rejected=[f"bad {n}" for n in numbers], **columns
    )


def test_counts_of_buffers_by_largest_remainder() -> None:
    buffers = [
        OfflineBuffer("replay", pairs(0, 100), share=3),
        OfflineBuffer("uf", pairs(1000, 100), share=2),
        OfflineBuffer("hh", pairs(2000, 100), share=1.5),
    ]
    mix = mix_buffers(mined(20), buffers, gamma=0.5, seed=0)
    # 20 · 3/6.5, 2/6.5 and 1.5/6.5: 9.23, 6.15 and 4.62.
    assert mix.requested == {"replay": 9, "uf": 6, "hh": 5}
    assert {name: len(drawn.rows) for name, drawn in mix.draws.items()} == mix.requested
    assert (mix.mined, mix.replay, mix.reached_share) == (20, 20, 0.5)
    assert mix.candidates == 80 + 100 + 100
    assert all(row >= 20 for row in mix.draws["replay"].rows)
    summary = json.loads(json.dumps(mix.summary(), allow_nan=False))
    assert summary["buffers"]["uf"] == {"drawn": 6, "requested": 6, "candidates": 100, "shortfall": 0}


def test_mined_prompts_are_excluded_from_every_buffer() -> None:
    buffers = [OfflineBuffer(name, pairs(0, 40)) for name in ("a", "b")]
    mix = mix_buffers(mined(30), buffers, gamma=0.5, seed=0, total=10)
    assert {row for drawn in mix.draws.values() for row in drawn.rows} <= {*range(30, 40)}


def test_pair_in_two_buffers_is_drawn_once() -> None:
    # Both have the same ten pairs. "b" also has the prompt of one with another answer, which is a distinct pair.
    other = pairs(0, 1).with_columns(chosen=pl.lit("another answer"))
    buffers = [OfflineBuffer("a", pairs(0, 10)), OfflineBuffer("b", pl.concat([pairs(0, 10), other]))]
    for seed in range(20):
        mix = mix_buffers(mined(0), buffers, gamma=1.0, seed=seed, total=11, on_shortfall="record")
        a, b = (set(mix.draws[name].rows) for name in ("a", "b"))
        assert mix.requested == {"a": 6, "b": 5}
        assert (len(a), len(b)) == (6, 5)
        assert not a & b
        assert mix.draws["b"].candidates == 11 - 6
        assert 10 in b
    mix = mix_buffers(mined(0), buffers, gamma=1.0, seed=0, total=20, on_shortfall="record")
    assert [len(drawn.rows) for drawn in mix.draws.values()] == [10, 1]
    assert mix.shortfall == {"mined": 0, "replay": 9}
    assert mix.summary()["buffers"]["b"]["shortfall"] == 9


def test_single_buffer_matches_mix_replay() -> None:
    data = pairs(0, 100, w=[float(i % 7) for i in range(100)])
    one = mix_replay(mined(), data, gamma=0.5, seed=9, weight_column="w")
    alone = mix_buffers(mined(), [OfflineBuffer("replay", data, weight_column="w")], gamma=0.5, seed=9)
    assert alone.draws["replay"].rows.equals(one.replay_rows)
    assert alone.mined_rows.equals(one.mined_rows)
    assert alone.summary() == one.summary()


def test_draw_depends_on_the_name_of_a_buffer_not_on_its_position() -> None:
    buffers = [OfflineBuffer(name, pairs(1000 * at, 500)) for at, name in enumerate(("replay", "x", "y"), 1)]
    mix = mix_buffers(mined(30), buffers, gamma=0.5, seed=4)
    reversed_mix = mix_buffers(mined(30), buffers[::-1], gamma=0.5, seed=4)
    for name, drawn in mix.draws.items():
        assert drawn.rows.equals(reversed_mix.draws[name].rows)
    keys = buffers[1].pairs["prompt_id"]
    assert mix.draws["x"].rows.equals(sample_replay(keys, 10, seed_for(4, "buffer", "x")))
    assert mix.draws["replay"].rows.equals(sample_replay(buffers[0].pairs["prompt_id"], 10, 4))
    assert mix.draws["x"].rows.to_list() != mix.draws["y"].rows.to_list()


def test_strata_and_weights_of_buffers() -> None:
    a = pairs(0, 40, source=["p", "q"] * 20)
    b = pairs(100, 40, source=["r", "s"] * 20, margin=[float(i % 4 == 1) for i in range(40)])
    buffers = [OfflineBuffer("a", a), OfflineBuffer("b", b, margin_power=1.0)]
    mix = mix_buffers(mined(0), buffers, gamma=1.0, seed=0, total=20, stratify_by="source", allocation="equal")
    strata = {name: drawn.strata.rows() for name, drawn in mix.draws.items() if drawn.strata is not None}
    assert strata == {"a": [("p", 20, 5), ("q", 20, 5)], "b": [("s", 10, 10)]}
    assert mix.summary()["buffers"]["b"]["strata"] == {"s": 10}


def test_shortfall_of_one_buffer() -> None:
    buffers = [OfflineBuffer("a", pairs(100, 50)), OfflineBuffer("b", pairs(200, 3))]
    message = r"10 mined and 10 .* 53 of 53 offline .*; buffer 'b' should contribute 5, but has 3 of 3 available"
    with pytest.raises(DataError, match=message):
        mix_buffers(mined(), buffers, gamma=0.5, seed=0)
    mix = mix_buffers(mined(), buffers, gamma=0.5, seed=0, on_shortfall="record")
    # The other buffer does not make up for it: the shares would differ from the requested ones.
    assert [len(drawn.rows) for drawn in mix.draws.values()] == [5, 3]
    assert mix.reached_share == 8 / 18


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"buffers": []}, UsageError, "there are no buffers to replay from"),
        (
            {"buffers": [OfflineBuffer("a", pairs(0, 3))] * 2},
            UsageError,
            "named a, a, but every buffer must have a name",
        ),
        ({"buffers": [OfflineBuffer("a", pairs(0, 3), share=0)]}, UsageError, "the share of buffer 'a' is 0"),
        ({"pair_columns": ["text"]}, DataError, "buffer 'a': column 'text', which identifies pairs, not found"),
        ({"stratify_by": "size"}, UsageError, "stratify_by is 'size'"),
        ({"stratify_by": "length"}, DataError, "column 'length' not found in the offline .* length_column="),
        ({"stratify_by": "source"}, DataError, "column 'source' not found in the offline .* source_column="),
        (
            {"buffers": [OfflineBuffer("a", pairs(100, 9)), OfflineBuffer("b", pairs(200, 9), margin_power=1.0)]},
            DataError,
            "buffer 'b': column 'margin' not found",
        ),
        (
            {
                "buffers": [
                    OfflineBuffer("a", pairs(100, 9)),
                    OfflineBuffer("b", pairs(200, 9).with_columns(chosen=pl.lit(1))),
                ]
            },
            DataError,
            "buffer 'b': column 'chosen' has dtype Int32, but String in an earlier buffer",
        ),
    ],
)
def test_invalid_buffers(options: dict[str, Any], error: type[Exception], message: str) -> None:
    defaults: dict[str, Any] = {
        "buffers": [OfflineBuffer("a", pairs(0, 90)), OfflineBuffer("b", pairs(0, 90))],
        "gamma": 0.5,
        "seed": 0,
    }
    with pytest.raises(error, match=message):
        mix_buffers(mined(), **(defaults | options))
