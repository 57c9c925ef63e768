"""Frames for the miner's tests, and the comparison of a result with the oracle's."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl
from mine_oracle import BASE, QUANTILES, REASONS, expected, with_defaults
from mine_penalty_oracle import Choices, assert_least_gap, assert_step

from dice_py import MinedPairs, mine_pairs

PAIRINGS = ("max_min", "max_random", "top_bottom", "max_sweet_spot", "all_pairs")
# No scaled buckets: of rounded scores, equal margins are not surely equal to the last bit.
DEBIAS: tuple[dict[str, Any], ...] = (
    {"debias": "none"},
    {"debias": "linear"},
    {"debias": "linear", "alpha": 0.015625},
    {"debias": "per_token"},
    {"debias": "bucket", "buckets": 4},
)


def random_frame(
    prompts: int = 500, seed: int = 0, *, unit: int = 64, longest: int = 40, most: int = 6
) -> pl.DataFrame:
    """Rows grouped by ascending prompt, with ties in everything and rewards that grow with length.

    Rewards are multiples of 1 / `unit`, so that sums and products in float64 are exact. 1 to `most` responses a
    prompt. Columns beside the usual: `text`, `tokens`, `hash` (each with equal values and nulls), `round` and
    `policy` (its name; as text the order is another one), `second` (a second model's reward, with gaps).
    """
    rng = np.random.default_rng(seed)
    responses = rng.integers(1, most + 1, prompts)
    n = int(responses.sum())
    length = rng.integers(0, longest, n)
    reward = np.round(rng.normal(size=n) * unit / 2 + length * unit * 0.02) / unit
    word = rng.integers(0, 5, n)
    # Rounds 9 and 10: as text the second comes first.
    policy = rng.integers(8, 11, n)
    second = np.round(reward * 4 + rng.normal(size=n) * 4) / 4
    second[rng.random(n) < 0.03] = np.nan
    second[rng.random(n) < 0.02] = np.inf

    def gaps(share: float) -> pl.Series:
        return pl.Series(rng.random(n) >= share)

    frame = pl.DataFrame(
        {
            "prompt_id": np.repeat(np.arange(prompts), responses),
            "reward": np.where(rng.random(n) < 0.02, rng.choice([np.nan, np.inf, -np.inf], n), reward),
            "response_tokens": length,
            "finish_reason": np.where(rng.random(n) < 0.05, "length", "stop"),
            "text": [f"word {w}" for w in word],
            "tokens": [list(range(w)) for w in word],
            "hash": word * 2**40 - 2**41,
            "round": policy,
            "policy": [f"round {p}" for p in policy],
            "second": second,
        }
    )
    holes = {name: gaps(0.03) for name in ("reward", "response_tokens", "second")}
    holes |= dict.fromkeys(("text", "tokens", "hash"), gaps(0.2))
    return frame.with_columns(pl.when(there).then(name).alias(name) for name, there in holes.items())


def in_chunks(frame: pl.DataFrame, seed: int = 0, chunks: int = 7) -> pl.DataFrame:
    cuts = np.sort(np.random.default_rng(seed).integers(0, frame.height + 1, chunks - 1)).tolist()
    edges = [0, *cuts, frame.height]
    return pl.concat([frame[a:b] for a, b in pairwise(edges)], rechunk=False)


def shuffled(frame: pl.DataFrame, seed: int = 0) -> pl.DataFrame:
    return frame.sample(fraction=1, shuffle=True, seed=seed)


def moved_prompts(frame: pl.DataFrame, places: list[int]) -> pl.DataFrame:
    """Rows in another order, given by a permutation, but those of a prompt in the same one: it decides which of equal
    rewards is taken."""
    order = frame.select(pl.Series("place", places), "prompt_id")
    return frame[order.with_columns(pl.col("place").sort().over("prompt_id"))["place"].arg_sort()]


LAYOUTS = ("grouped", "shuffled", "chunked")


def laid_out(frame: pl.DataFrame, layout: str, seed: int = 0) -> pl.DataFrame:
    if layout == "grouped":
        return frame
    return shuffled(frame, seed) if layout == "shuffled" else in_chunks(shuffled(frame, seed)[:-3], seed)


def random_options(seed: int) -> dict[str, Any]:
    """A choice of options that go together."""
    rng = random.Random(seed)
    pick, maybe = rng.choice, lambda *values: rng.choice([None, *values])
    options: dict[str, Any] = dict(pick([*DEBIAS, {"debias": "matched", "length_tolerance": pick([0, 2, 9])}]))
    if options["debias"] != "matched":
        options["pairing"] = pick(PAIRINGS)
    if options.get("pairing") in ("top_bottom", "all_pairs"):
        options["pairs_per_prompt"] = maybe(1, 2, 5)
    options |= {
        "top_k": pick([1, 2, 3]),
        "bottom_k": pick([1, 2, 3]),
        "sweet_spot_deviations": pick([0.75, 1.0, 2.0]),
        "seed": rng.getrandbits(64),
        "min_responses": pick([2, 2, 3, 4]),
        "min_length": maybe(0, 3),
        "max_length": maybe(30, 35),
        "truncated_column": pick(["auto", None]),
        "duplicate_column": maybe("text", "tokens", "hash"),
        "min_margin": maybe(-0.5, 0.25, 1.0),
        "min_margin_quantile": maybe(0.1, 0.3),
        "second_reward_column": maybe("second"),
        "win_rates": pick([True, False]),
        "soft_labels": pick([True, False]),
        "label_scale": pick([0.5, 1.0, 4.0]),
        "difficulty_quantile": maybe(0.25, 0.5, 1.0),
    }
    if pick([True, True, False]):
        ends = ["any", "newest", "oldest"]
        options |= {"policy_column": pick(["round", "policy"]), "chosen_from": pick(ends), "rejected_from": pick(ends)}
    return options


def _near(one: float | None, other: float | None, rel: float = 1e-9) -> bool:
    if one is None or other is None:
        return one is other
    return (math.isnan(one) and math.isnan(other)) or math.isclose(one, other, rel_tol=rel, abs_tol=1e-7)


def _fill(counts: dict[str, int], names: Any) -> dict[str, int]:
    return {name: counts.get(name, 0) for name in names}


NUMBERS = [
    "mean_length_gap_before", "mean_length_gap_after", "chosen_longer_share", "mean_consistency",
    "reward_length_correlation_before", "reward_length_correlation_after",
]  # fmt: skip
ROUNDED = ("margin", "chosen_win_rate", "rejected_win_rate", "soft_label", "consistency")


def assert_agrees(mined: Any, want: dict[str, Any], *, exact_margins: bool = True) -> None:
    """`mined` has what `want` has. Labels may differ in their last bits, and margins unless `exact_margins`."""
    pairs, other = mined.pairs, want["pairs"]
    assert pairs.columns[: len(BASE)] == BASE
    assert dict(pairs.schema) == {name: other.schema[name] for name in pairs.columns}
    assert set(pairs.columns) == set(other.columns)
    other = other.select(pairs.columns)
    loose = [name for name in ROUNDED if name in pairs.columns and not (name == "margin" and exact_margins)]
    assert pairs.height == other.height
    for name in pairs.columns:
        if name in loose:
            assert pairs[name].is_null().equals(other[name].is_null()), name
            one, two = (f[name].cast(pl.Float64).drop_nulls() for f in (pairs, other))
            off = ((one - two).abs() - two.abs() * 1e-6).max()
            assert off is None or off <= 1e-6, name  # type: ignore[operator]
        else:
            differ = pairs.select(pairs[name].ne_missing(other[name]).arg_true()).to_series()
            assert differ.is_empty(), f"{name} at {differ[:3].to_list()}: {pairs[differ[:3]]} but {other[differ[:3]]}"
    assert list(mined.dropped) == REASONS
    assert dict(mined.dropped) == want["dropped"]
    for name in ("dropped_prompts", "dropped_pairs"):
        counts, wanted = getattr(mined, name), want[name]
        names = counts.keys() | wanted.keys()
        assert _fill(counts, names) == _fill(wanted, names), name
    for name in NUMBERS:
        assert _near(getattr(mined, name), want[name]), f"{name}: {getattr(mined, name)} but {want[name]}"
    assert set(mined.margin_quantiles) == set(QUANTILES)
    for k in QUANTILES:
        assert _near(mined.margin_quantiles[k], want["margin_quantiles"][k], 1e-6), f"margin quantile {k}"
    assert (mined.prompts, mined.rows) == (want["prompts"], want["rows"])


def check(frame: pl.DataFrame, *, search: bool = True, **options: Any) -> MinedPairs:
    """Mines `frame` and compares every number of the result with the oracle's.

    With `search` the least gap is computed again, by bisection. Without, only the neighbors of the reported
    step are checked (and nothing with `chosen_from` or `rejected_from`).
    """
    mined = mine_pairs(frame, **options)
    o = with_defaults(options)
    if o["debias"] == "linear":
        assert mined.alpha is not None
        assert mined.alpha_low is not None
        assert mined.alpha_high is not None
        restricted = (o["chosen_from"], o["rejected_from"]) != ("any", "any")
        reported = (mined.alpha_low, mined.alpha, mined.alpha_high)
        if o["alpha"] != "auto":
            assert mined.alpha == o["alpha"]
            if not restricted and o["pairing"] == "max_min":
                assert_step(Choices(frame, **options), *reported)
        else:
            choices = Choices(frame, **options)
            if not restricted and o["pairing"] == "max_min":
                assert_least_gap(choices, *reported)
            if search:
                assert choices.gap(mined.alpha) == choices.least_gap()
        options["alpha"] = mined.alpha
    elif o["debias"] in ("bucket", "per_token", "matched"):
        assert mined.alpha is None
    assert_agrees(mined, expected(frame, **options), exact_margins=not (o["debias"] == "bucket" and o["bucket_scale"]))
    return mined


def frame(prompts: int = 40, responses: int = 8, seed: int = 0) -> pl.DataFrame:
    """Rewards that grow with length, in a frame grouped by prompt."""
    rng = np.random.default_rng(seed)
    n = prompts * responses
    length = rng.integers(5, 300, n)
    return pl.DataFrame(
        {
            "prompt_id": np.repeat(np.arange(prompts), responses),
            "reward": rng.normal(size=n) + length * 0.01,
            "response_tokens": length,
        },
        schema={"prompt_id": pl.UInt32, "reward": pl.Float32, "response_tokens": pl.UInt32},
    )


def small(**columns: Any) -> pl.DataFrame:
    """Two prompts of three responses each, with columns replaced."""
    rows = {
        "prompt_id": [1, 1, 1, 2, 2, 2],
        "reward": [3.0, 2.0, 1.0, 0.0, 5.0, 1.0],
        "response_tokens": [30, 20, 10, 7, 8, 9],
    }
    return pl.DataFrame(rows | columns)
