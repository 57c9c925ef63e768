"""The miner from Python: inputs of every kind, filters, ties, options and errors.

That the penalty is exact is tested in Rust (rust/dice-core/tests/oracle.rs).
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mine_data import PAIRINGS, frame, moved_prompts, small
from property_examples import examples

import dice_py
from dice_py import mine_pairs
from dice_py.errors import DataError

SCHEMA = {
    "prompt_id": pl.UInt32,
    "chosen_row": pl.UInt64,
    "rejected_row": pl.UInt64,
    "chosen_reward": pl.Float32,
    "rejected_reward": pl.Float32,
    "margin": pl.Float32,
    "chosen_length": pl.UInt32,
    "rejected_length": pl.UInt32,
}


def content(mined: dice_py.MinedPairs) -> pl.DataFrame:
    """The pairs without row numbers, which change when rows move."""
    return mined.pairs.drop("chosen_row", "rejected_row")


def test_schema_and_values() -> None:
    data = frame()
    mined = data.pipe(mine_pairs)
    assert dict(mined.pairs.schema) == SCHEMA
    assert mined.pairs["prompt_id"].to_list() == list(range(40))
    for side in ("chosen", "rejected"):
        rows = data[mined.pairs[f"{side}_row"]]
        assert rows["prompt_id"].equals(mined.pairs["prompt_id"])
        assert rows["reward"].equals(mined.pairs[f"{side}_reward"])
        assert rows["response_tokens"].equals(mined.pairs[f"{side}_length"])
    gap = mined.pairs["chosen_length"].cast(pl.Int64) - mined.pairs["rejected_length"].cast(pl.Int64)
    assert gap.mean() == mined.mean_length_gap_after
    assert mined.mean_length_gap_before > 50 > abs(mined.mean_length_gap_after)
    assert mined.alpha is not None
    reward = mined.pairs["chosen_reward"].cast(pl.Float64) - mined.pairs["rejected_reward"].cast(pl.Float64)
    assert (reward - mined.alpha * gap - mined.pairs["margin"]).abs().max() < 1e-5  # type: ignore[operator]
    assert (mined.prompts, mined.rows) == (40, 320)


def test_alpha_beats_a_fine_grid() -> None:
    data = frame(seed=3)
    mined = mine_pairs(data)
    assert mined.alpha_low is not None
    assert mined.alpha_high is not None
    assert mined.alpha is not None
    assert mined.alpha_low < mined.alpha < mined.alpha_high
    for alpha in np.linspace(0, 0.05, 200):
        at = mine_pairs(data, alpha=float(alpha))
        assert abs(at.mean_length_gap_after) >= abs(mined.mean_length_gap_after)
        assert at.alpha_low is not None
        assert at.alpha_high is not None
        assert at.alpha_low <= alpha < at.alpha_high
        same = mined.alpha_low <= alpha < mined.alpha_high
        assert same == content(at).drop("margin").equals(content(mined).drop("margin"))


def test_curve_is_the_step_function() -> None:
    data = frame(seed=4)
    mined = mine_pairs(data)
    assert mined.curve.schema == {"alpha": pl.Float64, "mean_length_gap": pl.Float64, "exact": pl.Boolean}
    assert mined.curve["exact"].all()
    assert 3 < mined.curve.height < 250
    assert mined.curve["alpha"].is_sorted()
    assert mined.curve["mean_length_gap"].is_sorted(descending=True)
    assert mined.alpha_low in mined.curve["alpha"]
    for alpha, gap in mined.curve[::20].select("alpha", "mean_length_gap").iter_rows():
        assert mine_pairs(data, alpha=alpha).mean_length_gap_after == gap


def test_no_penalty_where_none_is_needed() -> None:
    mined = mine_pairs(small(response_tokens=[5, 5, 5, 5, 5, 5]))
    assert (mined.alpha, mined.alpha_low, mined.alpha_high) == (0.0, 0.0, math.inf)
    assert mined.summary()["alpha_high"] is None


def test_of_two_penalties_as_good_the_lower() -> None:
    # Chosen longer by 20 below alpha = 1/20, shorter by 20 above: the same size.
    data = pl.DataFrame({"prompt_id": [1, 1], "reward": [1.0, 0.0], "response_tokens": [30, 10]})
    mined = mine_pairs(data)
    assert (mined.alpha, mined.alpha_low, mined.alpha_high) == (0.0, 0.0, 0.05)
    beyond = mine_pairs(data, alpha=7.0)
    assert (beyond.alpha, beyond.alpha_low, beyond.alpha_high) == (7.0, 0.05, math.inf)
    assert beyond.mean_length_gap_after == -20


@pytest.mark.parametrize("debias", ["none", "linear", "bucket"])
@pytest.mark.parametrize("scale", [False, True])
@settings(max_examples=examples(25), deadline=None)
@given(data=st.data())
def test_rows_and_chunks_may_move(debias: Any, scale: bool, data: st.DataObject) -> None:
    rows = data.draw(
        st.lists(
            st.tuples(st.integers(0, 5), st.floats(-2, 2, width=16), st.integers(0, 9)),
            min_size=1,
            max_size=60,
        )
    )
    original = pl.DataFrame(rows, schema=["prompt_id", "reward", "response_tokens"], orient="row")
    moved = moved_prompts(original, data.draw(st.permutations(range(len(rows)))))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=6)))
    edges = [0, *cuts, len(rows)]
    chunked = pl.concat([moved[a:b] for a, b in pairwise(edges)], rechunk=False)
    one, other = (mine_pairs(f, debias=debias, bucket_scale=scale, buckets=3) for f in (original, chunked))
    assert content(one).equals(content(other))
    assert one.summary() == other.summary()
    assert one.curve.equals(other.curve)
    assert not any(one.pairs["chosen_row"] == one.pairs["rejected_row"])
    for pairs, of in ((one.pairs, original), (other.pairs, chunked)):
        assert of[pairs["chosen_row"]]["reward"].cast(pl.Float32).equals(pairs["chosen_reward"])
        assert of[pairs["rejected_row"]]["response_tokens"].cast(pl.UInt32).equals(pairs["rejected_length"])


def test_grouped_descending_and_interleaved_agree() -> None:
    data = frame()
    for other in (data.reverse(), data.sort("response_tokens"), data.sort("prompt_id", descending=True)):
        assert content(mine_pairs(other)).equals(content(mine_pairs(data)))


class Capsule:
    """Knows the PyCapsule interface and nothing else."""

    def __init__(self, table: Any) -> None:
        self.table = table

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        stream: object = self.table.__arrow_c_stream__(requested_schema)
        return stream


def test_every_kind_of_frame() -> None:
    data = frame()
    expected = mine_pairs(data).pairs
    table = data.with_columns(text=pl.lit("x")).to_arrow()
    kinds: list[Any] = [
        data.lazy(),
        table,
        table.to_reader(max_chunksize=33),
        table.combine_chunks().to_batches()[0],
        Capsule(table),
        data[100:].vstack(data[:100]).sort("prompt_id", maintain_order=True),
    ]
    for kind in kinds[:-1]:
        assert mine_pairs(kind).pairs.equals(expected), type(kind)
    assert mine_pairs(kinds[-1]).pairs.drop("chosen_row", "rejected_row").equals(content(mine_pairs(data)))


def test_arrow_frames_name_all_their_columns() -> None:
    table = small(text=["x"] * 6).to_arrow()
    for kind in (table, table.to_reader(), Capsule(table)):
        with pytest.raises(DataError, match="columns are prompt_id, reward, response_tokens, text; name it"):
            mine_pairs(kind, reward_column="score")
    with pytest.raises(DataError, match="no rows"):
        mine_pairs(table.schema.empty_table())


def test_lazy_frames_collect_only_what_is_needed() -> None:
    def never(text: pl.Series) -> pl.Series:
        raise AssertionError("a column that is not needed was collected")

    lazy = frame().lazy().with_columns(response=pl.col("reward").map_batches(never, return_dtype=pl.String))
    assert lazy.pipe(mine_pairs).pairs.height == 40


@pytest.mark.parametrize(
    "dtype",
    [pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt64, pl.Int128, pl.Float64, pl.String],
)
def test_prompt_dtypes(dtype: Any) -> None:
    data = frame(prompts=9).with_columns(pl.col("prompt_id").cast(dtype))
    mined = mine_pairs(data.sample(fraction=1, shuffle=True, seed=0))
    assert mined.pairs["prompt_id"].equals(data["prompt_id"].unique(maintain_order=True))
    assert content(mined).drop("prompt_id").equals(content(mine_pairs(frame(prompts=9))).drop("prompt_id"))


def test_large_and_negative_prompt_ids() -> None:
    data = small(prompt_id=[10**18, 10**18, 10**18, -(10**18), -(10**18), -(10**18)])
    assert mine_pairs(data).pairs["prompt_id"].to_list() == [-(10**18), 10**18]
    shuffled = data[[0, 3, 1, 4, 2, 5]]
    assert content(mine_pairs(shuffled)).equals(content(mine_pairs(data)))
    top = small(prompt_id=pl.Series([2**64 - 1] * 3 + [0] * 3, dtype=pl.UInt64))
    assert mine_pairs(top).pairs["prompt_id"].to_list() == [0, 2**64 - 1]


def test_categories_go_by_their_text() -> None:
    data = small(prompt_id=["b", "b", "b", "a", "a", "a"]).with_columns(pl.col("prompt_id").cast(pl.Categorical))
    mined = mine_pairs(data)
    assert mined.pairs["prompt_id"].to_list() == ["a", "b"]
    assert mined.pairs["prompt_id"].dtype == pl.Categorical


def test_dictionary_columns() -> None:
    data = small()
    table = pa.table({name: data[name].to_arrow().dictionary_encode() for name in data.columns})
    assert content(mine_pairs(table)).equals(content(mine_pairs(data)))


@pytest.mark.parametrize("dtype", [pl.Float32, pl.Float64, pl.Int32, pl.Decimal(10, 2)])
def test_reward_dtypes(dtype: Any) -> None:
    data = small().with_columns(pl.col("reward").cast(dtype))
    assert content(mine_pairs(data)).equals(content(mine_pairs(small())))


@pytest.mark.parametrize("dtype", [pl.UInt8, pl.UInt16, pl.Int16, pl.Int32, pl.UInt64])
def test_length_dtypes(dtype: Any) -> None:
    data = small().with_columns(pl.col("response_tokens").cast(dtype))
    assert mine_pairs(data).pairs.equals(mine_pairs(small()).pairs)


def test_sliced_input() -> None:
    data = frame()
    # An offset of nulls and flags that is no multiple of eight bits.
    nulls = data.with_columns(
        reward=pl.when(pl.int_range(pl.len()) % 7 != 0).then("reward"),
        cut=pl.int_range(pl.len()) % 11 == 0,
    )
    part = nulls[13:250]
    mined = mine_pairs(part, truncated_column="cut")
    expected = part.filter(pl.col("reward").is_not_null() & ~pl.col("cut"))
    assert content(mined).equals(content(mine_pairs(expected)))
    assert mined.dropped["null"] == part["reward"].null_count()


def test_filters_count_each_row_once() -> None:
    nan, inf = math.nan, math.inf
    data = pl.DataFrame(
        {
            "prompt_id": [1] * 9 + [2, 3, 3, 4],
            "reward": [None, nan, inf, -inf, 1.0, 1.0, 1.0, 2.0, 3.0, 1.0, 1.0, 1.0, 1e39],
            "response_tokens": [1, 1, 5, 5, 5, 1, 99, 4, 10, 5, 6, 6, 5],
            "finish_reason": ["length"] * 5 + ["stop"] * 8,
        }
    )
    mined = mine_pairs(data, min_length=4, max_length=10)
    assert mined.dropped == {
        "null": 1,
        "not_finite": 4,
        "truncated": 1,
        "too_short": 1,
        "too_long": 1,
        "duplicate": 0,
        "too_few_responses": 1,
    }
    assert mined.dropped_prompts == {"too_few_responses": 2, "tied": 1, "no_contrast": 0, "no_match": 0}
    # Both bounds are kept.
    assert mined.pairs.select("chosen_row", "rejected_row").rows() == [(8, 7)]
    assert mine_pairs(data, truncated_column=None, min_length=4).dropped["truncated"] == 0


def test_finish_reason_may_be_null_or_categorical() -> None:
    reasons = ["length", None, "stop", "stop", "length", None]
    for dtype in (pl.String, pl.Categorical):
        data = small(finish_reason=pl.Series(reasons, dtype=dtype))
        mined = mine_pairs(data)
        assert mined.dropped["truncated"] == 2
        assert set(mined.pairs["chosen_row"]).isdisjoint({0, 4})


def test_equal_rewards_are_never_a_pair() -> None:
    tied = pl.DataFrame({"prompt_id": [1] * 6, "reward": [0.5] * 6, "response_tokens": [9, 7, 7, 9, 8, 8]})
    flat = pl.DataFrame({"prompt_id": [1] * 3, "reward": [0.0, -0.0, 0.0], "response_tokens": [4, 4, 4]})
    matched: dict[str, Any] = {"debias": "matched", "length_tolerance": 9}
    for rows in (tied, flat, tied.cast({"reward": pl.Float32}), tied.reverse()):
        for debias in ("none", "linear", "bucket", "per_token"):
            for pairing in PAIRINGS:
                mined = mine_pairs(rows, debias=debias, pairing=pairing)
                assert mined.pairs.is_empty()
                assert (mined.dropped_prompts["tied"], mined.dropped_prompts["no_contrast"]) == (1, 0)
                several = pairing in ("top_bottom", "all_pairs")
                assert (mined.dropped_pairs["tied"] > 0) == several
        assert mine_pairs(rows, alpha=0.25).pairs.is_empty()
        assert mine_pairs(rows, **matched).dropped_prompts["tied"] == 1
    assert mine_pairs(tied, pairing="all_pairs").dropped_pairs["tied"] == 15


def test_of_equal_rewards_a_hash_takes_one_and_not_the_shorter() -> None:
    # Each prompt: three of the best reward (3, 5 and 9 tokens), three of the worst.
    prompts = 600
    rows = pl.DataFrame(
        {
            "prompt_id": [p for p in range(prompts) for _ in range(6)],
            "reward": [1.0, 1.0, 1.0, -1.0, -1.0, -1.0] * prompts,
            "response_tokens": [3, 5, 9, 9, 5, 3] * prompts,
        }
    )
    for options in ({"debias": "none"}, {"debias": "none", "pairing": "max_random"}, {"alpha": 0.0}):
        mined = mine_pairs(rows, **options).pairs
        for side in ("chosen", "rejected"):
            # The expectation is 200, the standard deviation 11.5.
            assert all(150 < count < 250 for count in mined[f"{side}_length"].value_counts()["count"])
            assert mined[f"{side}_length"].n_unique() == 3
    one, other = (mine_pairs(rows, debias="none", seed=seed).pairs for seed in (0, 1))
    assert one.equals(mine_pairs(rows, debias="none").pairs)
    assert 100 < (one["chosen_row"] != other["chosen_row"]).sum() < 500
    # A prompt's choice depends on its own rows alone.
    half = rows.filter(pl.col("prompt_id") >= prompts // 2)
    alone = mine_pairs(half, debias="none").pairs.with_columns(pl.col("chosen_row", "rejected_row") + 3 * prompts)
    assert alone.equals(one.filter(pl.col("prompt_id") >= prompts // 2))


def test_ties_that_a_penalty_makes() -> None:
    # 3 - 0.125 * 24 = 1 - 0.125 * 8, to the last bit: the shorter is chosen.
    exact = pl.DataFrame({"prompt_id": [1] * 3, "reward": [3.0, 1.0, -5.0], "response_tokens": [24, 8, 1]})
    assert mine_pairs(exact, alpha=0.125).pairs.row(0)[1:3] == (1, 2)
    assert mine_pairs(exact, alpha=math.nextafter(0.125, 0)).pairs.row(0)[1:3] == (0, 2)
    assert mine_pairs(exact, alpha=0.125).alpha_low == 0.125
    # The penalty makes the shortest the best and the longest the worst, both of reward 0. From 2/25 on the shortest
    # with the other has the greater margin.
    ends = pl.DataFrame({"prompt_id": [1] * 3, "reward": [0.0, 0.0, 1.0], "response_tokens": [5, 50, 40]})
    assert mine_pairs(ends, alpha=0.07).pairs.row(0)[1:3] == (2, 1)
    assert mine_pairs(ends, alpha=0.09).pairs.row(0)[1:3] == (0, 2)


def test_nothing_left_is_not_an_error() -> None:
    for debias in ("none", "linear", "bucket"):
        mined = mine_pairs(frame(), debias=debias, min_responses=9)
        assert mined.pairs.is_empty()
        assert dict(mined.pairs.schema) == SCHEMA
        assert math.isnan(mined.mean_length_gap_after)
        assert mined.dropped["too_few_responses"] == 320
        assert mined.dropped_prompts["too_few_responses"] == 40
        assert mined.curve.is_empty()
        text = json.dumps(mined.summary(), allow_nan=False)
        assert json.loads(text)["mean_length_gap_after"] is None


@pytest.mark.parametrize("scale", [False, True])
def test_buckets_against_numpy(scale: bool) -> None:
    data = frame(prompts=60, seed=5)
    mined = mine_pairs(data, debias="bucket", buckets=7, bucket_scale=scale)
    assert mined.alpha is None
    assert mined.curve.is_empty()
    length, reward = data["response_tokens"].to_numpy(), data["reward"].to_numpy().astype(np.float64)
    cuts = np.quantile(length, np.arange(1, 7) / 7, method="inverted_cdf")
    bucket = np.searchsorted(cuts, length, side="left")
    adjusted = np.empty_like(reward)
    for b in np.unique(bucket):
        here = bucket == b
        adjusted[here] = reward[here] - reward[here].mean()
        if scale:
            adjusted[here] /= reward[here].std()
    expected = data.with_columns(pl.Series("adjusted", adjusted)).with_row_index("row")
    expected = expected.group_by("prompt_id", maintain_order=True).agg(
        chosen=pl.col("row").get(pl.col("adjusted").arg_max()),
        rejected=pl.col("row").get(pl.col("adjusted").arg_min()),
        margin=pl.col("adjusted").max() - pl.col("adjusted").min(),
    )
    assert mined.pairs["chosen_row"].to_list() == expected["chosen"].to_list()
    assert mined.pairs["rejected_row"].to_list() == expected["rejected"].to_list()
    assert np.allclose(mined.pairs["margin"], expected["margin"], atol=1e-5)


def test_importing_is_light() -> None:
    code = "import sys, dice_py; print({'torch', 'transformers', 'vllm', 'trl'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
