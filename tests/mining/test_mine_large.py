"""Tens of thousands of prompts, where the miner takes faster paths: the results must not differ.

With many prompts the penalty is bracketed on a sample, and unordered rows are sorted by parts. The oracle does neither
and compares exactly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
from mine_data import PAIRINGS, check, in_chunks, shuffled

from dice_py import mine_pairs

pytestmark = pytest.mark.slow

ORDERS = ("ascending", "descending", "permuted", "shuffled")
IDS = ("dense", "sparse", "signed", "high")
LONGEST = (300, 100_000, 2**26, 2**32 - 1)
# Of a reward: few values, or nearly none twice; both are exact in float32.
UNITS = (8, 2**20)


def prompt_ids(kind: str, count: int, rng: np.random.Generator) -> pl.Series:
    """Ascending."""
    if kind == "dense":
        return pl.Series(np.arange(count), dtype=pl.UInt32)
    if kind == "sparse":
        return pl.Series(np.sort(rng.choice(10**9, count, replace=False)), dtype=pl.UInt32)
    if kind == "signed":
        return pl.Series(np.sort(rng.integers(-(2**62), 2**62, count)), dtype=pl.Int64)
    return pl.Series((2**64 - 1) - np.arange(count, dtype=np.uint64)[::-1] * 3, dtype=pl.UInt64)


def large(
    prompts: int,
    seed: int,
    *,
    order: str = "ascending",
    ids: str = "dense",
    longest: int = 300,
    unit: int = 8,
    slope: Any = 2.0,
    holes: float = 0.02,
    dtype: Any = pl.Float32,
) -> pl.DataFrame:
    """1 to 6 responses a prompt; the reward grows by `slope` over the range of lengths (a number, or one a prompt)."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 7, prompts)
    n = int(counts.sum())
    place = np.repeat(np.arange(prompts), counts)
    share = rng.random(n) ** 2
    slopes = np.broadcast_to(np.asarray(slope, dtype=np.float64), (prompts,))[place]
    reward = np.round((np.clip(rng.normal(size=n), -3, 3) + slopes * share) * unit) / unit
    reward[rng.random(n) < holes / 2] = np.nan
    frame = pl.DataFrame(
        {
            "prompt_id": prompt_ids(ids, prompts, rng)[place],
            "reward": pl.Series(reward).cast(dtype),
            "response_tokens": pl.Series((share * longest).astype(np.int64)).cast(pl.UInt32),
            "finish_reason": np.where(rng.random(n) < holes, "length", "stop"),
            "same": rng.integers(0, 12, n),
            "round": rng.integers(0, 3, n),
        }
    ).with_columns(reward=pl.when(pl.Series(rng.random(n) >= holes)).then("reward"))
    if order == "shuffled":
        return shuffled(frame, seed)
    ranks = {"ascending": place, "descending": -place, "permuted": rng.permutation(prompts)[place]}[order]
    return frame[np.argsort(ranks, kind="stable")]


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(4, 16))])
def test_every_order_id_length_and_reward(seed: int) -> None:
    """A Latin square: each order with each kind of id and of length, and so on."""
    frame = large(
        (10_000, 17_000, 25_000)[seed % 3] if seed else 60_000,
        seed,
        order=ORDERS[seed % 4],
        ids=IDS[(seed + seed // 4) % 4],
        longest=LONGEST[(seed + seed // 4 * 2 + seed // 8) % 4],
        unit=UNITS[(seed // 2 + seed // 8) % 2],
        dtype=(pl.Float32, pl.Float64)[(seed + seed // 4) % 2],
    )
    mined = check(in_chunks(frame, seed) if seed % 3 else frame, search=False)
    assert mined.alpha
    assert mined.pairs.height > 7000
    assert min(mined.dropped[reason] for reason in ("null", "not_finite", "truncated", "too_few_responses")) > 100
    # The total of the gaps is within one step of zero.
    assert abs(mined.mean_length_gap_after) * 50 < abs(mined.mean_length_gap_before)


@pytest.mark.long
def test_shuffled_many() -> None:
    check(large(60_000, 20, order="shuffled", ids="signed", unit=2**20), search=False)


@pytest.mark.parametrize("order", ["ascending", *(pytest.param(order, marks=pytest.mark.long) for order in ORDERS[1:])])
def test_a_sample_that_misleads(order: str) -> None:
    """Prompts at one end of the ids, or few of them, decide where the gap crosses zero."""
    count = 12_000
    at = np.arange(count)
    slopes = {
        "drifts": np.linspace(-4, 10, count),
        "falls": np.linspace(10, -4, count),
        "at the end": np.where(at > count - 200, 200.0, 0.25),
        "rare": np.where(at % 499 == 3, 500.0, 0.125),
        "periodic": np.where(at % 64 < 4, 40.0, -1.0),
    }
    for number, (name, slope) in enumerate(slopes.items()):
        mined = check(large(count, number, order=order, slope=slope), search=False)
        assert mined.pairs.height > 5000, name


@pytest.mark.parametrize("order", ["ascending", "shuffled"])
def test_penalties_at_the_ends(order: str) -> None:
    # Longer responses are worse: no penalty helps.
    mined = check(large(10_000, 1, order=order, slope=-3.0), search=False)
    assert mined.alpha == mined.alpha_low == 0.0
    # All lengths are equal but in one prompt, far from what a sample may contain.
    level = large(10_000, 2, order=order, holes=0.0)
    one = level["prompt_id"].unique().sort()[7777]
    lengths = pl.when(pl.col("prompt_id") == one).then(pl.col("response_tokens") % 7).otherwise(9)
    check(level.with_columns(response_tokens=lengths.cast(pl.UInt32)), search=False)
    flat = mine_pairs(level.with_columns(response_tokens=pl.lit(9, dtype=pl.UInt32)))
    assert (flat.alpha, flat.alpha_high) == (0.0, float("inf"))
    # Two rewards and four lengths: break points that thousands of prompts share.
    coarse = level.with_columns(reward=(pl.col("reward") > 1).cast(pl.Float32), response_tokens=pl.col("same") % 4)
    mined = check(coarse, search=True)
    assert mined.pairs.height > 4000
    assert mined.dropped_prompts["tied"] > 1000


def test_equal_gaps_on_both_sides_take_the_lower() -> None:
    """Each prompt goes from +20 to -20 at 0.05: thousands of prompts at once, and nothing in between."""
    ids = np.repeat(np.arange(20_000), 2)
    frame = pl.DataFrame(
        {"prompt_id": ids, "reward": np.tile([1.0, 0.0], 20_000), "response_tokens": [30, 10] * 20_000}
    )
    for rows in (frame, shuffled(frame)):
        mined = mine_pairs(rows)
        assert (mined.alpha, mined.alpha_low, mined.alpha_high) == (0.0, 0.0, 0.05)
        assert mined.mean_length_gap_after == 20


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("alpha", [0.0, 0.0078125, 0.01, 5.0])
def test_penalties_that_are_given(alpha: float, order: str) -> None:
    check(large(10_000, 5, order=order, ids="sparse", longest=70_000), search=False, alpha=alpha / 256)


@pytest.mark.parametrize("order", ["permuted", "shuffled"])
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_pairings(pairing: str, order: str) -> None:
    frame = large(10_000, 6, order=order, ids="high")
    options: dict[str, Any] = {"pairs_per_prompt": 4} if pairing in ("top_bottom", "all_pairs") else {}
    check(frame, search=False, pairing=pairing, duplicate_column="same", seed=9, **options)


@pytest.mark.parametrize("order", ["ascending", "shuffled"])
@pytest.mark.parametrize(
    "options",
    [
        {"debias": "matched", "length_ratio": 0.125, "policy_column": "round", "chosen_from": "newest"},
        {"debias": "bucket", "buckets": 7},
        {"debias": "per_token", "min_margin_quantile": 0.5, "soft_labels": True},
        {"debias": "none", "win_rates": True, "second_reward_column": "same", "difficulty_quantile": 0.5},
        {"policy_column": "round", "chosen_from": "newest", "rejected_from": "oldest", "min_responses": 3},
    ],
    ids=lambda options: next(iter(options.values())),
)
def test_other_options(options: dict[str, Any], order: str) -> None:
    check(large(10_000, 7, order=order, ids="signed"), **options)
