"""Options that the miner refuses, and columns that it cannot use: each error names the option or the column."""

from __future__ import annotations

import math
from typing import Any

import polars as pl
import pytest

import dice_py
from dice_py.errors import DataError, UsageError

SMALL = pl.DataFrame(
    {
        "prompt_id": [1, 1, 1, 2, 2, 2],
        "reward": [3.0, 2.0, 1.0, 0.0, 5.0, 1.0],
        "response_tokens": [30, 20, 10, 7, 8, 9],
        "text": ["a", "b", "c", "a", "b", "c"],
        "round": [1, 2, 3, 1, 2, 3],
    }
)


def mine(**options: Any) -> dice_py.MinedPairs:
    return dice_py.mine_pairs(SMALL, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"debias": "quadratic"}, "debias.*'quadratic'.*none, linear, per_token, bucket, matched"),
        # matched and its bounds: exactly one, and nowhere else.
        ({"debias": "matched"}, "length_tolerance.*length_ratio"),
        ({"debias": "matched", "length_tolerance": 3, "length_ratio": 0.5}, "length_tolerance.*length_ratio"),
        ({"debias": "matched", "length_tolerance": -1}, "length_tolerance.*-1"),
        ({"debias": "matched", "length_tolerance": 2.5}, r"length_tolerance.*2\.5"),
        ({"debias": "matched", "length_ratio": -0.1}, r"length_ratio.*-0\.1"),
        ({"debias": "matched", "length_ratio": 1.5}, r"length_ratio.*1\.5"),
        ({"debias": "matched", "length_ratio": math.nan}, "length_ratio.*nan"),
        ({"length_tolerance": 3}, "length_tolerance.*matched"),
        ({"length_ratio": 0.5, "debias": "none"}, "length_ratio.*matched"),
        ({"debias": "matched", "length_tolerance": 3, "pairing": "all_pairs"}, "pairing.*max_min"),
        ({"debias": "matched", "length_tolerance": 3, "pairing": "max_random"}, "pairing.*max_min"),
        # pairings
        ({"pairing": "best"}, "pairing.*'best'.*max_min, max_random, top_bottom, max_sweet_spot, all_pairs"),
        ({"pairing": "top_bottom", "top_k": 0}, "top_k.*0"),
        ({"pairing": "top_bottom", "bottom_k": 0}, "bottom_k.*0"),
        ({"pairing": "top_bottom", "bottom_k": -4}, "bottom_k.*-4"),
        ({"pairing": "all_pairs", "pairs_per_prompt": 0}, "pairs_per_prompt.*0"),
        ({"pairs_per_prompt": 2}, "pairs_per_prompt.*top_bottom"),
        ({"pairing": "max_random", "pairs_per_prompt": 2}, "pairs_per_prompt.*all_pairs"),
        ({"pairing": "max_sweet_spot", "pairs_per_prompt": 2}, "pairs_per_prompt"),
        ({"pairing": "max_sweet_spot", "sweet_spot_deviations": -0.5}, r"sweet_spot_deviations.*-0\.5"),
        ({"pairing": "max_sweet_spot", "sweet_spot_deviations": math.nan}, "sweet_spot_deviations.*nan"),
        ({"pairing": "max_sweet_spot", "sweet_spot_deviations": math.inf}, "sweet_spot_deviations.*inf"),
        ({"pairing": "max_random", "seed": -1}, "seed.*-1"),
        ({"pairing": "max_random", "seed": 2**64}, "seed.*18446744073709551616"),
        # margins
        ({"min_margin": math.nan}, "min_margin.*nan"),
        ({"min_margin": -math.inf}, "min_margin.*-inf"),
        ({"min_margin_quantile": -0.25}, r"min_margin_quantile.*-0\.25"),
        ({"min_margin_quantile": 1.25}, r"min_margin_quantile.*1\.25"),
        ({"min_margin_quantile": math.nan}, "min_margin_quantile.*nan"),
        # policies
        ({"chosen_from": "newest"}, "chosen_from.*policy_column"),
        ({"rejected_from": "oldest"}, "rejected_from.*policy_column"),
        ({"policy_column": "round", "chosen_from": "latest"}, "chosen_from.*'latest'.*any, newest, oldest"),
        ({"policy_column": "round", "rejected_from": "first"}, "rejected_from.*'first'.*any, newest, oldest"),
        # beyond what can be counted
        ({"min_responses": 2**70}, "min_responses.*at most"),
        ({"debias": "bucket", "buckets": 10**12}, "buckets.*at most"),
        ({"pairing": "all_pairs", "pairs_per_prompt": 2**64}, "pairs_per_prompt.*at most"),
        ({"min_length": 5 * 10**9}, "min_length.*no length is above"),
        ({"alpha": 10**400}, "alpha"),
        # labels
        ({"soft_labels": True, "label_scale": 0.0}, r"label_scale.*0\.0"),
        ({"win_rates": True, "label_scale": -1.0}, r"label_scale.*-1\.0"),
        ({"win_rates": True, "label_scale": math.inf}, "label_scale.*inf"),
        ({"soft_labels": True, "label_scale": math.nan}, "label_scale.*nan"),
        ({"difficulty_quantile": 1.5}, r"difficulty_quantile.*1\.5"),
        ({"difficulty_quantile": -1.0}, r"difficulty_quantile.*-1\.0"),
        ({"difficulty_quantile": math.nan}, "difficulty_quantile.*nan"),
    ],
    ids=str,
)
def test_options_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=f"(?s){words}"):
        mine(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 7},
        {"seed": 2**64 - 1, "pairing": "max_random"},
        {"top_k": 5, "bottom_k": 5},
        {"sweet_spot_deviations": 0.0},
        {"label_scale": 3.0},
        {"policy_column": "round"},
        {"debias": "matched", "length_tolerance": 0},
        {"debias": "matched", "length_ratio": 1},
        {"min_margin": 0},
        {"min_margin_quantile": 1},
        {"difficulty_quantile": 0},
    ],
    ids=str,
)
def test_options_without_effect_and_the_ends_of_ranges_are_fine(options: dict[str, Any]) -> None:
    assert mine(**options).rows == 6


def with_column(name: str, values: Any, dtype: Any = None) -> pl.DataFrame:
    return SMALL.with_columns(pl.Series(name, values, dtype=dtype))


@pytest.mark.parametrize(
    ("frame", "options", "words"),
    [
        (SMALL, {"duplicate_column": "hash"}, "'hash' not found.*duplicate"),
        (SMALL, {"policy_column": "model"}, "'model' not found.*policy"),
        (SMALL, {"second_reward_column": "other"}, "'other' not found.*second"),
        (with_column("round", [1, 1, None, 1, 1, 1]), {"policy_column": "round"}, "row 2"),
        (with_column("round", [*"abcde", None]), {"policy_column": "round", "chosen_from": "newest"}, "row 5"),
        (with_column("round", [[1]] * 6), {"policy_column": "round"}, "'round'.*List"),
        (with_column("round", [{"a": 1}] * 6), {"policy_column": "round"}, "'round'.*Struct"),
        (SMALL, {"second_reward_column": "text"}, "'text'.*String"),
        (with_column("other", [[1.0]] * 6), {"second_reward_column": "other"}, "'other'.*List"),
        (SMALL, {"duplicate_column": "reward"}, "'reward'.*Float64"),
        (with_column("same", [{"a": 1}] * 6), {"duplicate_column": "same"}, "'same'.*Struct"),
        (with_column("same", [[1.5]] * 6), {"duplicate_column": "same"}, "'same'.*List"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_unsuitable_columns(frame: pl.DataFrame, options: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=f"(?s){words}"):
        dice_py.mine_pairs(frame, **options)


def test_a_null_policy_is_refused_in_any_order() -> None:
    """In the first row that has one, of shuffled rows as of grouped ones, and in rows that are dropped too."""
    policy = pl.Series([None if i in (37, 61) else i % 3 for i in range(100)])
    frame = pl.DataFrame(
        {"prompt_id": [i % 7 for i in range(100)], "reward": range(100), "response_tokens": range(100), "by": policy}
    )
    for data in (frame, frame.with_columns(reward=pl.when(pl.col("by").is_not_null()).then("reward"))):
        with pytest.raises(DataError, match="row 37"):
            dice_py.mine_pairs(data, policy_column="by")
        grouped = data.sort("prompt_id", maintain_order=True)
        first = grouped["by"].is_null().arg_true()[0]
        with pytest.raises(DataError, match=f"row {first}"):
            dice_py.mine_pairs(grouped, policy_column="by", chosen_from="newest")


def test_negative_lengths_name_their_row_whatever_the_options() -> None:
    bad = with_column("response_tokens", [1, 2, 3, 4, -5, 6])
    for options in (
        {"debias": "per_token"},
        {"debias": "matched", "length_tolerance": 3},
        {"pairing": "all_pairs"},
        {"duplicate_column": "text", "policy_column": "round", "rejected_from": "oldest"},
    ):
        with pytest.raises(DataError, match="row 4: the length is -5"):
            dice_py.mine_pairs(bad, **options)
        with pytest.raises(DataError, match="no rows"):
            dice_py.mine_pairs(bad.clear(), **options)
