"""What the report shows of a mining: histograms and counterfactual minings, against plain loops over the rows."""

from __future__ import annotations

import itertools
import json
import math
import random
from typing import Any

import polars as pl
import pytest

from dice_py import mine_pairs
from dice_py.config.mining import MiningOptions
from dice_py.mining.distributions import mining_distributions


def responses(prompts: int, samples: int, seed: int, longest: int = 300) -> pl.DataFrame:
    """Scored responses as a run has them: some cut off, some empty, some without a finite reward."""
    draw = random.Random(seed)
    rows = []
    for prompt in range(prompts):
        for _ in range(samples):
            length = draw.randint(1, longest)
            reward = draw.choice([draw.gauss(0, 1) + 0.01 * length, draw.gauss(0, 1), math.nan, -math.inf])
            reason = "length" if draw.random() < 0.1 else "stop"
            rows.append((prompt, reward, length, reason, draw.choice([0, length]), draw.randint(0, 9)))
    schema = {
        "prompt_id": pl.UInt32, "reward": pl.Float32, "response_tokens": pl.UInt32, "finish_reason": pl.String,
        "response_chars": pl.UInt32, "token_ids": pl.UInt64,
    }  # fmt: skip
    return pl.DataFrame(rows, schema=schema, orient="row")


def usable(frame: pl.DataFrame, options: MiningOptions) -> list[tuple[int, float]]:
    """The length and reward of every response that mining may use."""
    kept, seen = [], set()
    for row in frame.iter_rows(named=True):
        length = 0 if options.min_length and row["response_chars"] == 0 else row["response_tokens"]
        if not math.isfinite(row["reward"]) or row["finish_reason"] == "length":
            continue
        if length < (options.min_length or 0) or (options.max_length is not None and length > options.max_length):
            continue
        if options.debias == "per_token" and length == 0:
            continue
        if options.duplicate_column is not None and (row["prompt_id"], row["token_ids"]) in seen:
            continue
        seen.add((row["prompt_id"], row["token_ids"]))
        kept.append((length, row["reward"]))
    return kept


def bin_of(value: float, edges: list[float], closed: bool) -> int | None:
    for index, (low, high) in enumerate(itertools.pairwise(edges)):
        is_last = closed and index == len(edges) - 2
        if low <= value < high or (is_last and value == high):
            return index
    return None


def check_histogram(found: dict[str, Any], edges: list[float], values: list[float], closed: bool) -> None:
    bins = [bin_of(value, edges, closed) for value in values]
    assert found["counts"] == [bins.count(index) for index in range(len(edges) - 1)]
    assert found["outside"] == bins.count(None)
    assert found["mean"] == pytest.approx(sum(values) / len(values))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"debias": "none", "min_length": 0},
    {"debias": "linear", "alpha": 0.02, "max_length": 200, "duplicate_column": "token_ids"},
    {"debias": "per_token", "min_length": None},
    {"debias": "bucket", "buckets": 4, "pairing": "top_bottom", "pairs_per_prompt": 3},
    {"debias": "matched", "length_tolerance": 30},
]


@pytest.mark.parametrize("keywords", OPTIONS, ids=lambda keywords: keywords.get("debias", "default"))
def test_it_is_what_loops_over_the_rows_count(keywords: dict[str, Any]) -> None:
    frame, options = responses(120, 6, seed=1), MiningOptions(**keywords)
    mined = mine_pairs(frame, options)
    found = mining_distributions(frame, mined.pairs, options, mined.alpha)
    rows = usable(frame, options)
    assert (found["rows"], found["usable"]) == (frame.height, len(rows))

    plane = found["reward_length"]
    counts: dict[tuple[int, int], int] = {}
    outside = 0
    for length, reward in rows:
        x, y = bin_of(length, plane["length_edges"], False), bin_of(reward, plane["reward_edges"], True)
        if x is None or y is None:
            outside += 1
        else:
            counts[x, y] = counts.get((x, y), 0) + 1
    assert plane["counts"] == [[x, y, count] for (x, y), count in sorted(counts.items())]
    assert plane["outside"] == outside <= 0.02 * len(rows)

    plain = {name: value for name, value in keywords.items() if name not in ("alpha", "length_tolerance")}
    undebiased = mine_pairs(frame, **(plain | {"debias": "none"}))
    for when, pairs in (("before", undebiased.pairs), ("after", mined.pairs)):
        for side in ("chosen", "rejected"):
            lengths = pairs[f"{side}_length"].to_list()
            check_histogram(found["lengths"][f"{side}_{when}"], found["lengths"]["edges"], lengths, closed=False)
    margins = mined.pairs["margin"].to_list()
    check_histogram(found["margins"], found["margins"]["edges"], margins, closed=True)

    mean_length, mean_reward = (sum(values) / len(rows) for values in zip(*rows, strict=True))
    covariance = sum((length - mean_length) * (reward - mean_reward) for length, reward in rows)
    assert found["slope"] == pytest.approx(covariance / sum((length - mean_length) ** 2 for length, _ in rows))


@pytest.mark.parametrize("keywords", OPTIONS, ids=lambda keywords: keywords.get("debias", "default"))
def test_the_first_variant_is_this_mining_and_the_others_are_minings(keywords: dict[str, Any]) -> None:
    frame, options = responses(60, 5, seed=2), MiningOptions(**keywords)
    mined = mine_pairs(frame, options)
    variants = mining_distributions(frame, mined.pairs, options, mined.alpha)["variants"]
    assert variants[0]["overlap"] == 1.0
    assert variants[0]["pairs"] == mined.pairs.height
    assert variants[0]["mean_length_gap"] == mined.mean_length_gap_after
    names = [entry["variant"] for entry in variants]
    assert len(set(names)) == len(names)
    for debias in ("none", "linear", "per_token", "bucket", "matched"):
        assert any(name.startswith(f"debias={debias}") for name in names)
    own = {(row["chosen_row"], row["rejected_row"]) for row in mined.pairs.iter_rows(named=True)}
    plain = next(entry for entry in variants if entry["variant"] == "debias=none")
    base = {name: value for name, value in keywords.items() if name not in ("debias", "length_tolerance", "alpha")}
    other = mine_pairs(frame, debias="none", **base)
    pairs = {(row["chosen_row"], row["rejected_row"]) for row in other.pairs.iter_rows(named=True)}
    assert plain["overlap"] == pytest.approx(len(own & pairs) / len(own | pairs))
    assert plain["reward_length_correlation"] == other.reward_length_correlation_after
    matched = next(entry for entry in variants if entry["variant"].startswith("debias=matched"))
    assert (matched["error"] is None) == (options.pairing == "max_min")


def lines(frame: pl.DataFrame, **keywords: Any) -> dict[str, list[list[float]]]:
    options = MiningOptions(**keywords)
    mined = mine_pairs(frame, options)
    found = mining_distributions(frame, mined.pairs, options, mined.alpha)
    return {line["name"]: line["points"] for line in found["lines"]}


def test_the_penalty_as_a_line() -> None:
    frame = responses(80, 6, seed=3)
    rows = usable(frame, MiningOptions())
    mean_length, mean_reward = (sum(values) / len(rows) for values in zip(*rows, strict=True))
    alpha = mine_pairs(frame).alpha
    assert alpha is not None
    (x, low), (z, high) = lines(frame)["penalty"]
    assert (x, z) == (min(length for length, _ in rows), max(length for length, _ in rows))
    assert (high - low) / (z - x) == pytest.approx(alpha)
    # Both go through the means.
    for points in lines(frame).values():
        (x, low), (z, high) = points
        assert low + (high - low) * (mean_length - x) / (z - x) == pytest.approx(mean_reward)
    (x, low), (z, high) = lines(frame, debias="per_token")["penalty"]
    assert low / x == pytest.approx(mean_reward / mean_length) == high / z
    assert list(lines(frame, debias="matched", length_ratio=0.2)) == ["regression"]


def test_the_means_of_buckets_as_steps() -> None:
    frame = responses(80, 6, seed=4)
    rows = sorted(usable(frame, MiningOptions()))
    cuts = sorted({rows[math.ceil(j * len(rows) / 4) - 1][0] for j in range(1, 5)})
    expected = []
    for low, high in zip([0, *cuts], cuts, strict=False):
        bucket = [(length, reward) for length, reward in rows if low < length <= high]
        mean = sum(reward for _, reward in bucket) / len(bucket)
        expected += [[bucket[0][0], mean], [bucket[-1][0], mean]]
    found = lines(frame, debias="bucket", buckets=4)["penalty"]
    assert [x for x, _ in found] == [x for x, _ in expected]
    assert [y for _, y in found] == pytest.approx([y for _, y in expected])


def test_the_size_is_bounded_and_a_far_value_leaves_the_picture() -> None:
    frame = responses(2500, 8, seed=5, longest=100_000)
    far = frame[0].with_columns(reward=pl.lit(1e30, pl.Float32), response_tokens=pl.lit(4_000_000_000, pl.UInt32))
    frame = pl.concat([frame, far.with_columns(finish_reason=pl.lit("stop"), response_chars=pl.lit(9, pl.UInt32))])
    options = MiningOptions(debias="bucket", buckets=5000)
    mined = mine_pairs(frame, options)
    found = mining_distributions(frame, mined.pairs, options, mined.alpha)
    assert len(json.dumps(found, allow_nan=False)) < 100_000
    assert found["reward_length"]["length_edges"][-1] < 110_000
    assert found["reward_length"]["reward_edges"][-1] < 10_000
    assert found["lengths"]["edges"][-1] < 110_000


def test_one_value_and_none() -> None:
    frame = pl.DataFrame({"prompt_id": [1, 1], "reward": [0.5, 0.5], "response_tokens": [7, 7]})
    mined = mine_pairs(frame)
    assert mined.pairs.is_empty()
    found = mining_distributions(frame, mined.pairs, MiningOptions(), mined.alpha)
    json.dumps(found, allow_nan=False)
    assert found["reward_length"]["counts"] == [[0, 0, 2]]
    assert found["margins"] == {"edges": [], "counts": [], "mean": None, "outside": 0}
    assert found["slope"] is None
    nothing = mining_distributions(frame, mined.pairs, MiningOptions(min_length=8), 0.0)
    assert nothing["reward_length"] == {"length_edges": [], "reward_edges": [], "counts": [], "outside": 0}
    assert nothing["lines"] == []
