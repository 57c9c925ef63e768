"""Each option of the miner, and their combinations, against the oracle (mine_oracle.py) on seeded random data.

Examples worked out by hand: test_mine_by_hand.py. Options that are refused: test_mine_option_errors.py. Many
prompts: test_mine_large.py.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import numpy as np
import polars as pl
import pytest
from mine_data import DEBIAS, LAYOUTS, PAIRINGS, check, in_chunks, laid_out, random_frame, random_options, shuffled

from dice_py import MinedPairs, mine_pairs

POOLS = [(c, r) for c in ("any", "newest", "oldest") for r in ("any", "newest", "oldest")]


@lru_cache(maxsize=8)
def data(prompts: int = 1000, seed: int = 0) -> pl.DataFrame:
    return random_frame(prompts, seed)


def names(value: Any) -> str:
    return "-".join(str(v) for v in value.values()) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("debias", DEBIAS, ids=names)
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_pairing_by_debias(pairing: str, debias: dict[str, Any], layout: str) -> None:
    mined = check(laid_out(data(), layout), pairing=pairing, search=layout == "grouped", **debias)
    assert mined.pairs.height > 300
    assert mined.dropped_prompts["too_few_responses"] > 50


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pairing", ["max_min", "max_random"])
def test_scaled_buckets(pairing: str, layout: str) -> None:
    check(laid_out(data(), layout), pairing=pairing, debias="bucket", bucket_scale=True, buckets=3)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_the_penalty_is_that_of_max_min(pairing: str) -> None:
    """Whatever the pairing and the labels."""
    plain = mine_pairs(data())
    mined = mine_pairs(data(), pairing=pairing, soft_labels=True, min_margin=0.5)
    assert mined.alpha == plain.alpha
    assert plain.alpha


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "bound",
    [
        {"length_tolerance": 0},
        {"length_tolerance": 3},
        {"length_tolerance": 2**40},
        {"length_ratio": 0.0},
        {"length_ratio": 0.25},
        {"length_ratio": 0.1},
        {"length_ratio": 1.0},
    ],
    ids=names,
)
def test_matched(bound: dict[str, Any], layout: str) -> None:
    mined = check(laid_out(data(seed=1), layout), debias="matched", **bound)
    abs_diff = (mined.pairs["chosen_length"].cast(pl.Int64) - mined.pairs["rejected_length"].cast(pl.Int64)).abs()
    assert mined.pairs.height > 20
    if "length_tolerance" in bound:
        assert abs_diff.max() <= bound["length_tolerance"]  # type: ignore[operator]
    if max(bound.values()) < 1:
        assert mined.dropped_prompts["no_match"] > 0


def test_matched_without_a_bound_that_binds_is_max_min_of_margins() -> None:
    matched, plain = mine_pairs(data(), debias="matched", length_ratio=1.0), mine_pairs(data(), debias="none")
    assert matched.pairs["prompt_id"].equals(plain.pairs["prompt_id"])
    assert matched.pairs["margin"].equals(plain.pairs["margin"])


@pytest.mark.parametrize("cap", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("pairing", ["top_bottom", "all_pairs"])
def test_pairs_per_prompt(pairing: str, cap: int) -> None:
    mined = check(data(seed=2), pairing=pairing, pairs_per_prompt=cap, top_k=3, bottom_k=3)
    most = mined.pairs.group_by("prompt_id").len()["len"].max()
    assert most == min(cap, 9 if pairing == "top_bottom" else 15)
    mined = check(shuffled(data(seed=2)), pairing=pairing, pairs_per_prompt=cap, top_k=3, bottom_k=3, debias="none")


@pytest.mark.parametrize(("top", "bottom"), [(1, 1), (1, 4), (4, 1), (2, 3), (50, 2**31)])
def test_top_and_bottom(top: int, bottom: int) -> None:
    for debias in DEBIAS[:3]:
        check(data(seed=3), pairing="top_bottom", top_k=top, bottom_k=bottom, search=False, **debias)


def test_top_one_and_bottom_one_is_max_min() -> None:
    one = mine_pairs(data(), pairing="top_bottom", top_k=1, bottom_k=1)
    both = mine_pairs(data()).pairs
    assert one.pairs.equals(both.join(one.pairs, on="prompt_id", how="semi", maintain_order="left"))
    # Where the penalty makes two of equal reward the ends, there is no other pair to take.
    assert one.dropped_prompts["tied"] - mine_pairs(data()).dropped_prompts["tied"] == both.height - one.pairs.height


def test_top_and_bottom_of_everything_are_all_pairs() -> None:
    one = mine_pairs(data(), pairing="top_bottom", top_k=9, bottom_k=9).pairs
    assert one.equals(mine_pairs(data(), pairing="all_pairs").pairs)


@pytest.mark.parametrize("deviations", [0.0, 0.5, 1.0, 1.25, 2.0, 9.0, 1e300])
def test_sweet_spot(deviations: float) -> None:
    for options in (DEBIAS[0], DEBIAS[2]):
        check(data(seed=4), pairing="max_sweet_spot", sweet_spot_deviations=deviations, **options)
    far = mine_pairs(data(seed=4), pairing="max_sweet_spot", sweet_spot_deviations=9.0, debias="none").pairs
    # Far below all of them lies the worst.
    assert far.equals(mine_pairs(data(seed=4), debias="none").pairs)


@pytest.mark.parametrize("seed", [0, 1, 7, 2**63, 2**64 - 1])
@pytest.mark.parametrize("ids", ["sparse", "negative", "u64", "text", "category", "float"])
def test_random_rejected(seed: int, ids: str) -> None:
    number = pl.col("prompt_id")
    changed = {
        "sparse": (number * 1_000_003 + 7).cast(pl.UInt32),
        "negative": number * -(2**40) + 5,
        "u64": (2**64 - 1 - number.cast(pl.UInt64)).cast(pl.UInt64),
        "text": pl.format("prompt {}", number),
        "category": pl.format("prompt {}", number).cast(pl.Categorical),
        "float": number / 4 - 3,
    }
    frame = shuffled(data(300).with_columns(prompt_id=changed[ids]))
    check(frame, pairing="max_random", seed=seed, search=False)


def test_random_rejected_depends_on_seed_and_prompt_alone() -> None:
    frame = data(seed=5)
    one = mine_pairs(frame, pairing="max_random", debias="none", seed=3).pairs
    part = frame.filter(pl.col("prompt_id") % 3 == 1)
    other = mine_pairs(part, pairing="max_random", debias="none", seed=3).pairs
    rows = ["chosen_row", "rejected_row"]
    assert other.drop(rows).equals(one.filter(pl.col("prompt_id") % 3 == 1).drop(rows))
    again = mine_pairs(frame, pairing="max_random", debias="none", seed=4).pairs
    assert not again.equals(one)
    # Every place is drawn about as often.
    flat = pl.DataFrame({"prompt_id": np.repeat(np.arange(8000), 5), "reward": np.tile([0.0, 1, 2, 3, 4], 8000)})
    drawn = mine_pairs(flat.with_columns(response_tokens=1), pairing="max_random").pairs["rejected_reward"]
    assert drawn.value_counts()["count"].is_between(1850, 2150).all()
    assert drawn.n_unique() == 4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("least", [2, 3])
@pytest.mark.parametrize("column", ["text", "tokens", "hash"])
def test_duplicates(column: str, least: int, layout: str) -> None:
    for options in ({"debias": "none"}, {"debias": "per_token", "pairing": "all_pairs"}, {"alpha": 0.03125}):
        frame = laid_out(data(seed=6), layout)
        mined = check(frame, duplicate_column=column, min_responses=least, **options)
        assert mined.dropped["duplicate"] > 300


@pytest.mark.parametrize("dtype", [pl.Int8, pl.UInt8, pl.Int32, pl.UInt64, pl.List(pl.Int64), pl.List(pl.UInt16)])
def test_duplicate_dtypes(dtype: Any) -> None:
    base = pl.col("tokens") if dtype.is_nested() else pl.col("tokens").list.len()
    check(data(seed=6).with_columns(same=base.cast(dtype)), duplicate_column="same", debias="none")


def test_long_texts_that_differ_at_the_end_are_no_duplicates() -> None:
    texts = ["x" * 10_000 + end for end in ("a", "b", "a", "")] + ["", "\x00"]
    frame = pl.DataFrame({"prompt_id": 1, "reward": range(6), "response_tokens": 1, "text": texts})
    mined = mine_pairs(frame, duplicate_column="text", pairing="all_pairs")
    assert mined.dropped["duplicate"] == 1
    assert mined.pairs.height == 10


@pytest.mark.parametrize(("column", "layout"), [("round", "grouped"), ("policy", "shuffled")])
@pytest.mark.parametrize("pool", POOLS, ids="-".join)
def test_pools(pool: tuple[str, str], column: str, layout: str) -> None:
    frame = laid_out(data(300, seed=7), layout)
    options: dict[str, Any] = {"policy_column": column, "chosen_from": pool[0], "rejected_from": pool[1]}
    mined = check(frame, **options)
    assert mined.pairs.schema["chosen_policy"] == frame.schema[column]
    for pairing in PAIRINGS[1:]:
        check(frame, pairing=pairing, debias="none", **options)
    check(frame, debias="matched", length_tolerance=5, **options)
    check(frame, debias="per_token", pairing="top_bottom", top_k=3, **options)


@pytest.mark.parametrize("dtype", [pl.Int8, pl.UInt64, pl.Float32, pl.Categorical, pl.Enum(["8", "9", "10"])])
def test_policy_dtypes(dtype: Any) -> None:
    number = pl.col("round")
    text = dtype in (pl.Categorical, pl.Enum)
    frame = data(300, seed=8).with_columns(round=(number.cast(pl.String) if text else number).cast(dtype))
    for chosen in ("newest", "oldest"):
        mined = check(frame, policy_column="round", chosen_from=chosen, debias="none", pairing="all_pairs")
        assert mined.pairs.schema["chosen_policy"] == dtype


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_thresholds(pairing: str) -> None:
    frame = data(seed=9)
    for options in ({"debias": "none"}, {"alpha": 0.015625}):
        for margin in (-1.0, 0.0, 0.5, 1.0, 1e30):
            mined = check(frame, pairing=pairing, min_margin=margin, **options)
            assert (mined.pairs["margin"] >= margin).all()
        for quantile in (0.0, 0.1, 0.5, 1.0):
            check(frame, pairing=pairing, min_margin_quantile=quantile, **options)
        mined = check(frame, pairing=pairing, min_margin=0.75, min_margin_quantile=0.25, **options)
        assert mined.dropped_pairs["below_min_margin"] > 10
        assert mined.dropped_pairs["below_quantile"] > 10
    if pairing in ("top_bottom", "all_pairs"):
        check(frame, pairing=pairing, pairs_per_prompt=2, min_margin=0.75, min_margin_quantile=0.25)


@pytest.mark.parametrize("debias", DEBIAS, ids=names)
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_labels(pairing: str, debias: dict[str, Any]) -> None:
    frame = laid_out(data(600, seed=10), "chunked")
    every: dict[str, Any] = {
        "win_rates": True,
        "soft_labels": True,
        "difficulty_quantile": 0.4,
        "second_reward_column": "second",
    }
    mined = check(frame, pairing=pairing, search=False, **every, **debias)
    labels = ["chosen_win_rate", "rejected_win_rate", "soft_label", "consistency"]
    assert [mined.pairs.schema[name] for name in labels] == [pl.Float32] * 4
    rates = mined.pairs.select((pl.col("chosen_win_rate") >= pl.col("rejected_win_rate") - 1e-6).all())
    assert rates.item()
    assert mined.pairs["consistency"].null_count() > 0
    check(frame, pairing=pairing, search=False, label_scale=0.125, **every, **debias)
    for name, value in every.items():
        alone = check(frame, pairing=pairing, search=False, **{name: value}, **debias)
        assert alone.pairs.width in (9, 10)


def test_labels_of_extreme_margins_are_no_nan() -> None:
    frame = pl.DataFrame({"prompt_id": [1, 1], "reward": [1e30, -1e30], "response_tokens": [1, 1]})
    mined = mine_pairs(frame, debias="none", soft_labels=True, win_rates=True, label_scale=1e-30)
    assert mined.pairs.select("soft_label", "chosen_win_rate", "rejected_win_rate").row(0) == (1.0, 0.75, 0.25)


@pytest.mark.parametrize("dtype", [pl.Float32, pl.Float64, pl.Int16])
def test_second_reward_dtypes(dtype: Any) -> None:
    second = pl.col("second").cast(dtype, strict=False) if dtype == pl.Int16 else pl.col("second").cast(dtype)
    frame = data(300, seed=11).with_columns(second=second)
    mined = check(frame, second_reward_column="second", debias="matched", length_ratio=0.5)
    assert mined.mean_consistency is not None
    assert mined.mean_consistency > 0.5


def test_defaults_add_nothing() -> None:
    mined = check(data(seed=12))
    assert mined.pairs.columns == [
        "prompt_id", "chosen_row", "rejected_row", "chosen_reward", "rejected_reward", "margin", "chosen_length",
        "rejected_length",
    ]  # fmt: skip
    assert sum(mined.dropped_pairs.values()) == 0
    assert mined.mean_consistency is None


def summary(mined: MinedPairs) -> dict[str, Any]:
    stored: dict[str, Any] = json.loads(json.dumps(mined.summary(), allow_nan=False))
    return stored


def test_summary_has_every_number() -> None:
    options: dict[str, Any] = {"pairing": "all_pairs", "min_margin": 1.0, "second_reward_column": "second"}
    mined = mine_pairs(data(), **options)
    stored = summary(mined)
    for name in (
        "dropped", "dropped_prompts", "dropped_pairs", "mean_consistency", "chosen_longer_share", "margin_quantiles",
        "reward_length_correlation_before", "reward_length_correlation_after", "alpha", "mean_length_gap_after",
    ):  # fmt: skip
        assert stored[name] == getattr(mined, name), name
    empty = summary(mine_pairs(data(), min_responses=99, **options))
    assert empty["pairs"] == 0
    assert empty["chosen_longer_share"] is None
    assert empty["mean_consistency"] is None
    assert set(empty["margin_quantiles"].values()) == {None}


@pytest.mark.parametrize("seed", range(60))
def test_combinations(seed: int) -> None:
    frame = laid_out(random_frame(400, seed, longest=60, most=8), LAYOUTS[seed % 3], seed)
    check(in_chunks(frame, seed) if seed % 2 else frame, search=seed % 4 == 0, **random_options(seed))
